//! The header of a safetensors file: names, types, shapes and offsets of its tensors.
//!
//! A file is `n` (u64, little endian), `n` bytes of JSON, and the data. The JSON has an entry for each tensor, `dtype`,
//! `shape` and `data_offsets`, and perhaps `__metadata__`, strings by name; the tensors cover the data without gap or
//! overlap (README of the `safetensors` project, section "Format", where the limit of 100 MB is stated too).
//!
//! The crate `safetensors` provides the types, and writes files. Its validation neither names the tensor nor gives the
//! numbers, and adds lengths from the file without a check for overflow, so everything is checked here.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::error::CheckpointError;

/// The limit that the format puts on the JSON.
pub(super) const LIMIT: u64 = 100_000_000;

/// The entry that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

/// Bytes and parts of a tensor's name: models have names of some 100 bytes and 15 parts, and work with names takes time
/// that may grow with the square of these.
const NAME_LIMIT: usize = 1024;
const PARTS_LIMIT: usize = 64;

/// Bytes before the JSON.
const LENGTH_BYTES: u64 = 8;

/// The checked header of a safetensors file: the types, shapes and offsets of its tensors.
#[derive(Debug, Clone, Default)]
pub struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
    data_start: u64,
    data_len: usize,
}

impl Header {
    /// Computes the number of bytes at the start of a file that [`Self::parse`] needs, from the first 8 of them and the
    /// length of the whole file. Readers that stream need it.
    ///
    /// # Errors
    /// [`CheckpointError::Truncated`] if the file is shorter than its header; [`CheckpointError::HeaderTooLong`] above
    /// the 100 MB that the format allows.
    pub fn len_from(first: &[u8], file_len: u64) -> Result<usize, CheckpointError> {
        let short = |expected| CheckpointError::Truncated { what: "header", expected, got: file_len };
        let first: [u8; 8] = first.get(..8).and_then(|b| b.try_into().ok()).ok_or_else(|| short(LENGTH_BYTES))?;
        let json = u64::from_le_bytes(first);
        if json > LIMIT {
            return Err(CheckpointError::HeaderTooLong { got: json, limit: LIMIT });
        }
        let len = LENGTH_BYTES + json;
        if len > file_len {
            return Err(short(len));
        }
        usize::try_from(len).map_err(|_| CheckpointError::HeaderTooLong { got: json, limit: LIMIT })
    }

    /// Parses the start of a file of `file_len` bytes: at least the first [`Self::len_from`] bytes.
    ///
    /// # Errors
    /// * [`CheckpointError::Truncated`] if the file is shorter than its header;
    /// * [`CheckpointError::HeaderTooLong`] above the 100 MB that the format allows;
    /// * [`CheckpointError::Json`];
    /// * [`CheckpointError::Overflow`] for a shape too large for the address space;
    /// * [`CheckpointError::Unexpected`] for a name of more than 1024 bytes or 64 parts, and for elements of less than a byte
    ///   that are not whole bytes together;
    /// * [`CheckpointError::Bytes`] for a tensor whose place has another length than its shape and type need, and for a file
    ///   of another length than its tensors have;
    /// * [`CheckpointError::Offset`] for tensors that overlap or leave a gap.
    pub fn parse(start: &[u8], file_len: u64) -> Result<Self, CheckpointError> {
        let len = Self::len_from(start, file_len)?;
        let cut = || CheckpointError::Truncated { what: "header", expected: len as u64, got: start.len() as u64 };
        let json = start.get(8..len).ok_or_else(cut)?;
        let Entries { tensors, metadata } = serde_json::from_slice(json)
            .map_err(|e| CheckpointError::Json { what: "header".to_string(), reason: e.to_string() })?;
        let data_len = check_places(&tensors)?;
        let (expected, got) = (data_len as u64, file_len - len as u64);
        if expected != got {
            return Err(CheckpointError::Bytes { what: "data of all tensors".to_string(), expected, got });
        }
        Ok(Self { tensors, metadata, data_start: len as u64, data_len })
    }

    /// The type and shape of a tensor, and its offsets in the data.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// The range of the bytes of a tensor in the file.
    #[must_use]
    pub fn file_range(&self, name: &str) -> Option<Range<u64>> {
        let (start, end) = self.get(name)?.data_offsets;
        Some(self.data_start + start as u64..self.data_start + end as u64)
    }

    /// The metadata of the file: strings by name, such as `format` = `pt` in files of `PyTorch`.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The number of bytes of all tensors.
    #[must_use]
    pub fn data_len(&self) -> usize {
        self.data_len
    }
}

/// Bytes that a tensor needs; an error if its elements, of less than a byte, do not fill whole ones.
pub(super) fn tensor_bytes(tensor: &str, dtype: Dtype, shape: &[usize]) -> Result<usize, CheckpointError> {
    let overflow = || CheckpointError::Overflow { tensor: tensor.to_string(), shape: shape.to_vec() };
    let elements = product(shape).ok_or_else(overflow)?;
    let bits = elements.checked_mul(dtype.bitsize()).ok_or_else(overflow)?;
    if !bits.is_multiple_of(8) {
        let reason = format!("{elements} elements of {dtype} are not whole bytes");
        return Err(CheckpointError::Unexpected { tensor: tensor.to_string(), reason });
    }
    Ok(bits / 8)
}

/// `Ok` for a name that a tensor in a file can have.
pub(super) fn check_name(name: &str) -> Result<(), CheckpointError> {
    let parts = name.split('.').count();
    if name.len() <= NAME_LIMIT && parts <= PARTS_LIMIT {
        return Ok(());
    }
    let reason =
        format!("a name of {} bytes and {parts} parts; {NAME_LIMIT} and {PARTS_LIMIT} are allowed", name.len());
    Err(CheckpointError::Unexpected { tensor: name.to_string(), reason })
}

/// The number of elements, if it fits.
pub(super) fn product(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim))
}

/// `Ok` with the length of the data if each tensor has the bytes that it needs, and starts where the one before it
/// ends.
fn check_places(tensors: &BTreeMap<String, TensorInfo>) -> Result<usize, CheckpointError> {
    let mut in_order: alloc::vec::Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut data_end = 0;
    for (name, info) in in_order {
        check_name(name)?;
        let (start, end) = info.data_offsets;
        let expected = tensor_bytes(name, info.dtype, &info.shape)?;
        if end.checked_sub(start) != Some(expected) {
            let what = format!("{name} at {start}..{end}");
            let got = end.saturating_sub(start) as u64;
            return Err(CheckpointError::Bytes { what, expected: expected as u64, got });
        }
        if start != data_end {
            return Err(CheckpointError::Offset { tensor: name.clone(), expected: data_end as u64, got: start as u64 });
        }
        data_end = end;
    }
    Ok(data_end)
}

/// The JSON as it is.
struct Entries {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
            } else {
                let info: TensorInfo = map.next_value().map_err(|e| A::Error::custom(format!("{name}: {e}")))?;
                if tensors.contains_key(&name) {
                    return Err(A::Error::custom(format!("{name}: two tensors of this name")));
                }
                tensors.insert(name, info);
            }
        }
        Ok(Entries { tensors, metadata })
    }
}
