//! Writes a safetensors file whose tensors come in pieces, in any order and from several threads.
//!
//! Sizes are known before the data, so the header's size is too, and every byte goes straight to its place. The exception
//! is small: late tensors, such as a text whose length depends on the weights. Those come last in the file and are kept in
//! memory until the header is written, at the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nf4::checkpoint::{Entry, Layout};

use crate::io::write_all_at;

/// A file being written.
#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    file: File,
    layout: Layout,
    late: Mutex<BTreeMap<String, Vec<u8>>>,
    written: AtomicU64,
}

impl Writer {
    /// Will write these tensors to a new file; `path` is for messages.
    pub(crate) fn new(
        file: File,
        path: &Path,
        entries: Vec<Entry>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let layout = Layout::new(entries, metadata).with_context(|| path.display().to_string())?;
        let (path, late) = (path.to_owned(), Mutex::default());
        Ok(Self { path, file, layout, late, written: AtomicU64::new(0) })
    }

    /// Writes bytes of a tensor, from `offset` of its bytes on. No byte may be written twice.
    pub(crate) fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = || format!("{}: tensor {name}", self.path.display());
        let place = self.layout.place(name).with_context(at)?;
        let end = offset.checked_add(bytes.len() as u64);
        let inside = end.is_some_and(|end| end <= place.len() as u64);
        ensure!(inside, "{}: {offset} + {} of {} bytes", at(), bytes.len(), place.len());
        self.put(&self.layout, place.start as u64 + offset, bytes).with_context(at)?;
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The bytes of a late tensor.
    pub(crate) fn set_late(&self, name: &str, bytes: Vec<u8>) {
        self.late.lock().expect("no thread panics with the lock").insert(name.to_owned(), bytes);
    }

    /// Writes late tensors and the header. The bytes of all tensors.
    pub(crate) fn finish(self) -> Result<u64> {
        let finish = || -> Result<u64> {
            let late = self.late.lock().expect("no thread panics with the lock");
            let lens = late.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect();
            let layout = self.layout.shortened(&lens)?;
            let mut written = self.written.load(Ordering::Relaxed);
            for (name, bytes) in &*late {
                let place = layout.place(name).with_context(|| name.clone())?;
                self.put(&layout, place.start as u64, bytes)?;
                written += bytes.len() as u64;
            }
            let expected = layout.data_len();
            ensure!(written == expected, "{written} bytes of data were written instead of {expected}");
            write_all_at(&self.file, layout.header(), 0)?;
            Ok(expected)
        };
        finish().with_context(|| self.path.display().to_string())
    }

    /// Writes bytes of the data.
    fn put(&self, layout: &Layout, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        write_all_at(&self.file, bytes, layout.header().len() as u64 + offset)
    }
}
