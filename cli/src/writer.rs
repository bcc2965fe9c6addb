//! Writes a safetensors file whose tensors come in pieces, in any order and from several threads.
//!
//! Sizes are known before the data, so the header's size is too, and every byte goes straight to its place. The
//! exception is small: a tensor that holds text of a length not yet known. Those come last in the file and are kept in
//! memory; the header is written at the end, padded with spaces (which the format allows) to the size that was
//! reserved.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::io::write_all_at;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// If true, `shape` holds the largest number of bytes that the tensor can have; they come by [`Writer::set_text`].
    pub(crate) is_text: bool,
}

impl Entry {
    /// A tensor whose size is known.
    pub(crate) fn new(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), is_text: false }
    }
}

/// A file being written.
#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, String>,
    /// In the order of the file; texts last, with the largest sizes.
    entries: Vec<Entry>,
    /// Place of each tensor in the file, and its size.
    spans: HashMap<String, (u64, u64)>,
    data_start: u64,
    texts: Mutex<BTreeMap<String, Vec<u8>>>,
    written: AtomicU64,
}

impl Writer {
    /// Will write these tensors to a new file; `path` is for messages.
    pub(crate) fn new(
        file: File,
        path: &Path,
        mut entries: Vec<Entry>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let new = || -> Result<Self> {
            // As the safetensors library orders them: aligned types first.
            entries.sort_by(|a, b| (a.is_text, b.dtype, &a.name).cmp(&(b.is_text, a.dtype, &b.name)));
            let (header, spans) = header(&entries, &metadata, &BTreeMap::new())?;
            let data_start = (8 + header.len()).next_multiple_of(8) as u64;
            let spans = spans.into_iter().map(|(name, (start, len))| (name, (data_start + start, len))).collect();
            let (path, texts) = (path.to_owned(), Mutex::default());
            Ok(Self { path, file, metadata, entries, spans, data_start, texts, written: AtomicU64::new(0) })
        };
        new().with_context(|| path.display().to_string())
    }

    /// Writes bytes of a tensor, from `offset` of its bytes on. No byte may be written twice.
    pub(crate) fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = || format!("{}: tensor {name}", self.path.display());
        let (start, length) = *self.spans.get(name).with_context(at)?;
        let end = offset.checked_add(bytes.len() as u64);
        ensure!(end.is_some_and(|end| end <= length), "{}: {offset} + {} of {length} bytes", at(), bytes.len());
        write_all_at(&self.file, bytes, start + offset).with_context(at)?;
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The bytes of a tensor that [`Entry::is_text`].
    pub(crate) fn set_text(&self, name: &str, text: Vec<u8>) -> Result<()> {
        let entry = self.entries.iter().find(|e| e.is_text && e.name == name);
        let fits = entry.is_some_and(|e| text.len() <= e.shape[0]);
        ensure!(fits, "{}: tensor {name}: no room for {} bytes", self.path.display(), text.len());
        self.texts.lock().expect("no thread panics with the lock").insert(name.to_owned(), text);
        Ok(())
    }

    /// Writes texts and header. The bytes of all tensors.
    pub(crate) fn finish(self) -> Result<u64> {
        let finish = || -> Result<u64> {
            let texts = self.texts.into_inner().expect("no thread panics with the lock");
            let (mut header, spans) = header(&self.entries, &self.metadata, &texts)?;
            for (name, text) in &texts {
                write_all_at(&self.file, text, self.data_start + spans[name].0)?;
            }
            let expected: u64 = spans.values().map(|(_, length)| length).sum();
            let written = self.written.into_inner() + texts.values().map(|t| t.len() as u64).sum::<u64>();
            ensure!(written == expected, "{written} bytes of data were written instead of {expected}");
            header.resize(usize::try_from(self.data_start)? - 8, b' ');
            write_all_at(&self.file, &(self.data_start - 8).to_le_bytes(), 0)?;
            write_all_at(&self.file, &header, 8)?;
            Ok(expected)
        };
        finish().with_context(|| self.path.display().to_string())
    }
}

type Spans = HashMap<String, (u64, u64)>;

/// The header's JSON and the place of each tensor in the data, with the texts that there are in place of the largest
/// ones.
fn header(
    entries: &[Entry],
    metadata: &BTreeMap<String, String>,
    texts: &BTreeMap<String, Vec<u8>>,
) -> Result<(Vec<u8>, Spans)> {
    let (mut start, mut infos, mut spans) = (0_usize, Vec::new(), HashMap::new());
    for Entry { name, dtype, shape, .. } in entries {
        let shape = texts.get(name).map_or_else(|| shape.clone(), |text| vec![text.len()]);
        let bits = shape.iter().try_fold(dtype.bitsize(), |n, d| n.checked_mul(*d));
        let end = bits.and_then(|bits| start.checked_add(bits / 8));
        let end = end.with_context(|| format!("tensor {name}: {dtype} {shape:?} is too large"))?;
        let twice = spans.insert(name.clone(), (start as u64, (end - start) as u64)).is_some();
        ensure!(!twice, "tensor {name} would be written twice");
        infos.push((name.clone(), TensorInfo { dtype: *dtype, shape, data_offsets: (start, end) }));
        start = end;
    }
    let header = serde_json::to_vec(&Metadata::new(Some(metadata.clone().into_iter().collect()), infos)?)?;
    Ok((header, spans))
}
