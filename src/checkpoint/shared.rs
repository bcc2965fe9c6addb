//! A safetensors file in memory that layers share.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use core::fmt;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::header::Header;
use super::read::{check_vector, len_of, owned_bytes, read_f32};
use super::source::TensorSource;
use crate::weight::store::{SharedBytes, Store};

/// A safetensors file in memory, such as a mapped one, whose bytes layers share: [`Linear4bit::load`] copies no packed
/// codes from it, and scales only if their address is not a multiple of 4.
///
/// ```
/// use std::sync::Arc;
/// use nf4::checkpoint::{FloatType, Linear4bit, SharedFile, to_safetensors};
/// use nf4::{BlockSize, Quantized4Bit};
/// # let weight = Quantized4Bit::quantize(&[0.5_f32; 32 * 64], 32, 64, BlockSize::B64, true)?;
/// # let layer = Linear4bit::new(weight, FloatType::BF16);
/// # let mapped = to_safetensors(&layer.tensors("mlp.up_proj"))?;
/// let file = SharedFile::parse(Arc::new(mapped))?;
/// let layer = Linear4bit::load(&file, "mlp.up_proj")?;
/// # let (owned, all) = (layer.weight().memory_bytes(), layer.weight().data_bytes());
/// # assert!(owned <= all - layer.weight().packed().len());
/// drop(file); // The layer keeps the bytes alive.
/// # assert_eq!(layer.weight().packed().len(), 1024);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`Linear4bit::load`]: super::Linear4bit::load
#[derive(Clone)]
pub struct SharedFile {
    header: Header,
    bytes: SharedBytes,
    /// Where the data of the tensors starts.
    start: usize,
}

impl SharedFile {
    /// Parses a whole file.
    ///
    /// # Errors
    /// [`CheckpointError::Truncated`] and [`CheckpointError::HeaderTooLong`] for the length of the header;
    /// [`CheckpointError::Json`] for its text; [`CheckpointError::Overflow`], [`CheckpointError::Unexpected`],
    /// [`CheckpointError::Bytes`] and [`CheckpointError::Offset`] for a tensor in it. [`Header::parse`] says when.
    pub fn parse(bytes: SharedBytes) -> Result<Self, CheckpointError> {
        let file = (*bytes).as_ref();
        let header = Header::parse(file, file.len() as u64)?;
        let start = file.len() - header.data_len();
        Ok(Self { header, bytes, start })
    }

    /// The header of the file.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where the bytes of a tensor are in the file.
    fn place(&self, name: &str) -> Option<Range<usize>> {
        let (start, end) = self.header.get(name)?.data_offsets;
        Some(self.start + start..self.start + end)
    }
}

impl TensorSource for SharedFile {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.header.iter().map(|(name, _)| name))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.get(name)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let place = self.place(name).ok_or_else(|| CheckpointError::Missing { tensor: name.into() })?;
        // Empty if the owner no longer has the bytes; whoever asked counts them.
        Ok(Cow::Borrowed((*self.bytes).as_ref().get(place).unwrap_or_default()))
    }

    fn shared(&self, name: &str) -> Option<(SharedBytes, Range<usize>)> {
        Some((self.bytes.clone(), self.place(name)?))
    }
}

impl fmt::Debug for SharedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedFile").field("header", &self.header).field("start", &self.start).finish_non_exhaustive()
    }
}

/// The bytes of a tensor, shared if the source can, else copied.
pub(super) fn store_bytes(source: &dyn TensorSource, name: &str) -> Result<Store<u8>, CheckpointError> {
    match checked_place(source, name)? {
        Some((bytes, place)) => Store::<u8>::shared(bytes, place).map_err(|error| in_tensor(name, error)),
        None => Ok(owned_bytes(source, name)?.into()),
    }
}

/// The values of a tensor that must be F32 and have this many, shared if the source can and their address allows it.
pub(super) fn store_f32(source: &dyn TensorSource, name: &str, len: usize) -> Result<Store<f32>, CheckpointError> {
    check_vector(source, name, Dtype::F32, "F32", len)?;
    match checked_place(source, name)? {
        Some((bytes, place)) => Store::<f32>::shared(bytes, place).map_err(|error| in_tensor(name, error)),
        None => Ok(read_f32(source, name, len)?.into()),
    }
}

/// Where a tensor is in memory that can be shared, if it has the bytes that its type and shape need there.
fn checked_place(
    source: &dyn TensorSource,
    name: &str,
) -> Result<Option<(SharedBytes, Range<usize>)>, CheckpointError> {
    let (expected, place) = (len_of(source, name)?, source.shared(name));
    match &place {
        Some((_, range)) if range.len() != expected => {
            let (expected, got) = (expected as u64, range.len() as u64);
            Err(CheckpointError::Bytes { what: name.to_owned(), expected, got })
        }
        _ => Ok(place),
    }
}

fn in_tensor(name: &str, error: crate::Error) -> CheckpointError {
    CheckpointError::Layer { layer: name.to_owned(), error }
}
