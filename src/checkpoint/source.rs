//! Sources of tensors: a byte slice, or anything else that has names, types, shapes and bytes.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::float::FloatType;
use super::header::{Header, tensor_bytes};
use crate::weight::store::SharedBytes;

/// A source of tensors by name, such as a [`TensorFile`] on a byte slice, or a reader of the shards of a model.
///
/// Threads may share a source, so a reader that has a position in a file must keep it behind a lock.
///
/// A model in several files, each of them in memory:
///
/// ```
/// use std::borrow::Cow;
/// use nf4::checkpoint::{CheckpointError, Linear4bit, TensorFile, TensorInfo, TensorSource};
/// # use nf4::checkpoint::{FloatType, to_safetensors};
/// # use nf4::{BlockSize, Quantized4Bit};
///
/// struct Shards<'a>(Vec<TensorFile<'a>>);
///
/// impl TensorSource for Shards<'_> {
///     fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
///         Box::new(self.0.iter().flat_map(|shard| shard.names()))
///     }
///     fn info(&self, name: &str) -> Option<&TensorInfo> {
///         self.0.iter().find_map(|shard| shard.info(name))
///     }
///     fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
///         let shard = self.0.iter().find(|shard| shard.info(name).is_some());
///         shard.ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() })?.read(name)
///     }
/// }
///
/// # let weight = Quantized4Bit::quantize(&[0.5_f32; 32 * 64], 32, 64, BlockSize::B64, false)?;
/// # let layer = Linear4bit::new(weight, FloatType::BF16);
/// # let (first, second) = (to_safetensors(&layer.tensors("mlp.up_proj"))?, to_safetensors(&layer.tensors("mlp.gate_proj"))?);
/// // `first` and `second` are the bytes of model-00001-of-00002.safetensors and model-00002-of-00002.safetensors.
/// let model = Shards(vec![TensorFile::parse(&first)?, TensorFile::parse(&second)?]);
/// let layer = Linear4bit::load(&model, "mlp.gate_proj")?;
/// # assert_eq!(layer.weight().rows(), 32);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait TensorSource: Sync {
    /// The names of all tensors, in any order.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// The type and shape of a tensor, without reading its bytes; `None` if there is no tensor of this name.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Reads the bytes of a tensor, little endian; they are borrowed if they are in memory already.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`]; [`CheckpointError::Read`] with the reason.
    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError>;

    /// The location of the bytes of a tensor, if layers can share them instead of copying, as from a [`SharedFile`].
    ///
    /// [`SharedFile`]: super::SharedFile
    fn shared(&self, name: &str) -> Option<(SharedBytes, Range<usize>)> {
        let _ = name;
        None
    }

    /// Reads some bytes of a tensor. A source whose tensors are not in memory should read only these.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`]; [`CheckpointError::Read`] with the reason; [`CheckpointError::Bytes`] if the tensor does
    /// not have them.
    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let bytes = self.read(name)?;
        if range.start > range.end || range.end > bytes.len() {
            let (expected, got) = (range.end as u64, bytes.len() as u64);
            return Err(CheckpointError::Bytes { what: name.to_owned(), expected, got });
        }
        Ok(match bytes {
            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
            Cow::Owned(mut bytes) => {
                bytes.truncate(range.end);
                bytes.drain(..range.start);
                Cow::Owned(bytes)
            }
        })
    }
}

/// A safetensors file in memory, from which nothing is copied.
#[derive(Debug, Clone)]
pub struct TensorFile<'a> {
    header: Header,
    data: &'a [u8],
}

impl<'a> TensorFile<'a> {
    /// Parses a whole file.
    ///
    /// # Errors
    /// [`CheckpointError::Truncated`] and [`CheckpointError::HeaderTooLong`] for the length of the header;
    /// [`CheckpointError::Json`] for its text; [`CheckpointError::Overflow`], [`CheckpointError::Unexpected`],
    /// [`CheckpointError::Bytes`] and [`CheckpointError::Offset`] for a tensor in it. [`Header::parse`] says when.
    pub fn parse(file: &'a [u8]) -> Result<Self, CheckpointError> {
        let header = Header::parse(file, file.len() as u64)?;
        let data = &file[file.len() - header.data_len()..];
        Ok(Self { header, data })
    }

    /// The header of the file.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl TensorSource for TensorFile<'_> {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.header.iter().map(|(name, _)| name))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.get(name)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let info = self.header.get(name).ok_or_else(|| missing(name))?;
        Ok(Cow::Borrowed(&self.data[info.data_offsets.0..info.data_offsets.1]))
    }
}

fn missing(name: &str) -> CheckpointError {
    CheckpointError::Missing { tensor: name.to_owned() }
}

/// Tensors in memory, by name.
pub type TensorMap<'a> = BTreeMap<String, TensorData<'a>>;

impl TensorSource for TensorMap<'_> {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.get(name).map(|tensor| &tensor.info)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let tensor = self.get(name).ok_or_else(|| missing(name))?;
        Ok(Cow::Borrowed(&tensor.bytes))
    }
}

/// A tensor in memory: type, shape and bytes.
#[derive(Debug, Clone)]
pub struct TensorData<'a> {
    info: TensorInfo,
    bytes: Cow<'a, [u8]>,
}

impl<'a> TensorData<'a> {
    /// A tensor of this type and shape, row-major and little endian.
    ///
    /// # Errors
    /// [`CheckpointError::Overflow`] and [`CheckpointError::Bytes`] if `bytes` does not have the length that they need;
    /// the errors call it `name`.
    pub fn new(
        name: &str,
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, CheckpointError> {
        let (bytes, expected) = (bytes.into(), tensor_bytes(name, dtype, &shape)?);
        if bytes.len() != expected {
            let (expected, got) = (expected as u64, bytes.len() as u64);
            return Err(CheckpointError::Bytes { what: name.to_owned(), expected, got });
        }
        Ok(Self::from_parts(dtype, shape, bytes))
    }

    /// A tensor of parts that are known to fit.
    pub(super) fn from_parts(dtype: Dtype, shape: Vec<usize>, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self { info: TensorInfo { dtype, shape, data_offsets: (0, bytes.len()) }, bytes }
    }

    /// A vector of bytes.
    pub(super) fn u8(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self::from_parts(Dtype::U8, alloc::vec![bytes.len()], bytes)
    }

    /// A vector of values in this float type.
    pub(super) fn floats(values: &[f32], float: FloatType) -> Self {
        let mut bytes = Vec::new();
        float.extend_bytes(values, &mut bytes);
        Self::from_parts(float.dtype(), alloc::vec![values.len()], bytes)
    }

    /// The same bytes under another shape that is known to have as many elements.
    pub(super) fn with_shape(mut self, shape: Vec<usize>) -> Self {
        self.info.shape = shape;
        self
    }

    /// The same tensor without a copy.
    pub(super) fn borrowed(&self) -> TensorData<'_> {
        TensorData { info: self.info.clone(), bytes: Cow::Borrowed(&self.bytes) }
    }

    /// The type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
