//! Writing a safetensors file.

use alloc::borrow::ToOwned;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use safetensors::tensor::{Metadata, TensorInfo};

use super::CheckpointError;
use super::header::{LIMIT, tensor_bytes};
use super::source::{TensorSource, bytes_of, info_of};

/// The start of a safetensors file, and the order in which the bytes of the tensors follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Length and JSON.
    pub header: Vec<u8>,
    /// Names, in the order of the data.
    pub names: Vec<String>,
    /// Bytes of all tensors.
    pub data_len: u64,
}

impl Layout {
    /// How the Python package lays out these tensors: larger types first, then by name; the header is padded to a
    /// multiple of 8 bytes. It has `format` = `pt` as metadata, without which transformers does not load a file.
    ///
    /// # Errors
    /// [`CheckpointError::Overflow`] for tensors too large for the address space; [`CheckpointError::HeaderTooLong`]
    /// above the limit of the format.
    pub fn new(source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        let mut tensors = Vec::new();
        for name in source.names() {
            let info = info_of(source, name)?;
            tensors.push((
                name.to_owned(),
                info.dtype,
                info.shape.clone(),
                tensor_bytes(name, info.dtype, &info.shape)?,
            ));
        }
        tensors.sort_by(|(a_name, a, ..), (b_name, b, ..)| b.cmp(a).then_with(|| a_name.cmp(b_name)));
        // A source that gives a name twice means one tensor.
        tensors.dedup_by(|(a, ..), (b, ..)| a == b);
        let (mut infos, mut end) = (Vec::new(), 0_usize);
        for (name, dtype, shape, bytes) in tensors {
            let start = end;
            let overflow = || CheckpointError::Overflow { tensor: name.clone(), shape: shape.clone() };
            end = start.checked_add(bytes).ok_or_else(overflow)?;
            infos.push((name, TensorInfo { dtype, shape, data_offsets: (start, end) }));
        }
        let names: Vec<String> = infos.iter().map(|(name, _)| name.clone()).collect();
        let fail = |reason: String| CheckpointError::Json { what: "header".to_owned(), reason };
        let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
        let metadata = Metadata::new(Some(metadata), infos).map_err(|e| fail(e.to_string()))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|e| fail(e.to_string()))?;
        json.resize(json.len().next_multiple_of(8), b' ');
        let len = json.len() as u64;
        if len > LIMIT {
            return Err(CheckpointError::HeaderTooLong { got: len, limit: LIMIT });
        }
        let mut header = len.to_le_bytes().to_vec();
        header.append(&mut json);
        Ok(Self { header, names, data_len: end as u64 })
    }
}

/// Writes a safetensors file in pieces, one tensor at a time: what `sink` is given, in order, is the file.
///
/// # Errors
/// Those of [`Layout::new`], of the source and of `sink`.
pub fn write_safetensors(
    source: &dyn TensorSource,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let layout = Layout::new(source)?;
    sink(&layout.header)?;
    layout.names.iter().try_for_each(|name| sink(&bytes_of(source, name)?))
}

/// A safetensors file in memory; see [`Layout`].
///
/// # Errors
/// Those of [`Layout::new`] and of the source.
pub fn to_safetensors(source: &dyn TensorSource) -> Result<Vec<u8>, CheckpointError> {
    let mut file = Vec::new();
    write_safetensors(source, &mut |bytes| {
        file.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(file)
}
