//! Layout and writing of safetensors files.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::error::CheckpointError;
use super::header::{LIMIT, METADATA, check_name, tensor_bytes};
use super::read::{bytes_of, info_of};
use super::source::TensorSource;

/// The name, type and shape of a tensor in the [`Layout`] of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: String,
    /// The type.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// Whether the tensor, a vector of bytes, may turn out shorter than `shape` says; see [`Layout::shortened`].
    pub is_late: bool,
}

impl Entry {
    /// A tensor whose size is known.
    #[must_use]
    pub fn new(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), is_late: false }
    }
}

/// The layout of a safetensors file: its header, and the offsets of the tensors after it.
///
/// The order is that of the Python package: larger types first, then by name; the header is padded to a multiple of 8
/// bytes. Tensors that may turn out shorter come last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    metadata: BTreeMap<String, String>,
    /// In the order of the data.
    entries: Vec<Entry>,
    places: BTreeMap<String, Range<usize>>,
    header: Vec<u8>,
    data_len: usize,
}

impl Layout {
    /// Lays out these tensors. If `metadata` has no `format`, which transformers needs to load a file, it is set to `pt`.
    ///
    /// # Errors
    /// [`CheckpointError::Unexpected`] for a name that stands twice, for one that the format reserves, for one that
    /// [`Header::parse`] refuses, and for a type of less than a byte; [`CheckpointError::Overflow`] for tensors too large
    /// for the address space; [`CheckpointError::HeaderTooLong`] above the limit of the format.
    ///
    /// [`Header::parse`]: super::Header::parse
    pub fn new(mut entries: Vec<Entry>, metadata: BTreeMap<String, String>) -> Result<Self, CheckpointError> {
        entries.sort_by(|a, b| {
            a.is_late.cmp(&b.is_late).then_with(|| b.dtype.cmp(&a.dtype)).then_with(|| a.name.cmp(&b.name))
        });
        let mut metadata = metadata;
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        let (mut places, mut infos, mut end) = (BTreeMap::new(), Vec::new(), 0_usize);
        for Entry { name, dtype, shape, .. } in &entries {
            let unexpected =
                |reason: &str| CheckpointError::Unexpected { tensor: name.clone(), reason: reason.to_owned() };
            if name == METADATA {
                return Err(unexpected("safetensors keeps this name for what is not a tensor"));
            }
            if dtype.bitsize() < 8 {
                return Err(unexpected(&alloc::format!("tensors of type {dtype} are not written")));
            }
            check_name(name)?;
            let start = end;
            let overflow = || CheckpointError::Overflow { tensor: name.clone(), shape: shape.clone() };
            end = start.checked_add(tensor_bytes(name, *dtype, shape)?).ok_or_else(overflow)?;
            if places.insert(name.clone(), start..end).is_some() {
                return Err(unexpected("two tensors of this name"));
            }
            infos.push((name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) }));
        }
        let header = header(&metadata, infos)?;
        Ok(Self { metadata, entries, places, header, data_len: end })
    }

    /// Lays out all tensors of a source.
    ///
    /// # Errors
    /// [`CheckpointError::Unexpected`] for a name that safetensors does not allow and for elements of less than a byte;
    /// [`CheckpointError::Overflow`] and [`CheckpointError::HeaderTooLong`] if the file would be too large.
    pub fn of(source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        // A source that gives a name twice means one tensor.
        let names: alloc::collections::BTreeSet<&str> = source.names().collect();
        let entry = |name| info_of(source, name).map(|info| Entry::new(name, info.dtype, &info.shape));
        Self::new(names.into_iter().map(entry).collect::<Result<_, _>>()?, BTreeMap::new())
    }

    /// The same layout once the late tensors are there, with the number of bytes that they have; the header is padded
    /// with spaces, which the format allows, to the length that it had, so that no other tensor moves.
    ///
    /// # Errors
    /// [`CheckpointError::Bytes`] for a late tensor that is longer than was said, or not there.
    pub fn shortened(&self, lens: &BTreeMap<String, usize>) -> Result<Self, CheckpointError> {
        let mut entries = self.entries.clone();
        for entry in entries.iter_mut().filter(|entry| entry.is_late) {
            let expected = entry.shape.iter().product::<usize>();
            let got = lens.get(&entry.name).copied().unwrap_or(usize::MAX);
            if got > expected {
                let what = entry.name.clone();
                return Err(CheckpointError::Bytes { what, expected: expected as u64, got: got as u64 });
            }
            entry.shape = alloc::vec![got];
        }
        let mut layout = Self::new(entries, self.metadata.clone())?;
        layout.header.resize(self.header.len(), b' ');
        layout.header[..8].copy_from_slice(&self.header[..8]);
        Ok(layout)
    }

    /// Length and JSON.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The tensors, in the order of the data.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// The range of the bytes of a tensor in the data.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<Range<usize>> {
        self.places.get(name).cloned()
    }

    /// The number of bytes of all tensors.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        self.data_len as u64
    }
}

fn header(metadata: &BTreeMap<String, String>, infos: Vec<(String, TensorInfo)>) -> Result<Vec<u8>, CheckpointError> {
    let fail = |reason: String| CheckpointError::Json { what: "header".to_owned(), reason };
    let metadata = metadata.clone().into_iter().collect();
    let metadata = Metadata::new(Some(metadata), infos).map_err(|e| fail(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| fail(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let len = json.len() as u64;
    if len > LIMIT {
        return Err(CheckpointError::HeaderTooLong { got: len, limit: LIMIT });
    }
    let mut header = len.to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Writes a safetensors file, one tensor at a time, by passing the bytes to `sink` in order.
///
/// # Errors
/// [`CheckpointError::Unexpected`] for a name that safetensors does not allow and for elements of less than a byte;
/// [`CheckpointError::Overflow`] and [`CheckpointError::HeaderTooLong`] if the file would be too large; what the
/// source and `sink` return.
pub fn write_safetensors(
    source: &dyn TensorSource,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let layout = Layout::of(source)?;
    sink(layout.header())?;
    layout.entries().try_for_each(|entry| sink(&bytes_of(source, &entry.name)?))
}

/// Writes a safetensors file in memory.
///
/// # Errors
/// [`CheckpointError::Unexpected`] for a name that safetensors does not allow and for elements of less than a byte;
/// [`CheckpointError::Overflow`] and [`CheckpointError::HeaderTooLong`] if the file would be too large;
/// [`CheckpointError::Memory`]; what the source returns.
pub fn to_safetensors(source: &dyn TensorSource) -> Result<Vec<u8>, CheckpointError> {
    let mut file = Vec::new();
    write_safetensors(source, &mut |bytes| {
        super::read::make_room("the file", &mut file, bytes.len())?;
        file.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(file)
}
