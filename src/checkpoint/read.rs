//! Reading tensors from a source, with every relation checked and memory that may be refused.

use alloc::borrow::{Cow, ToOwned};
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::float::FloatType;
use super::header::tensor_bytes;
use super::source::TensorSource;

/// Type and shape, or the error that there is no such tensor.
pub(super) fn info_of<'s>(source: &'s dyn TensorSource, name: &str) -> Result<&'s TensorInfo, CheckpointError> {
    source.info(name).ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() })
}

/// Bytes that a tensor has, by its type and shape.
pub(super) fn len_of(source: &dyn TensorSource, name: &str) -> Result<usize, CheckpointError> {
    let info = info_of(source, name)?;
    tensor_bytes(name, info.dtype, &info.shape)
}

/// The bytes of a tensor, whose number is checked against type and shape: a source may be anyone's.
pub(super) fn bytes_of<'s>(source: &'s dyn TensorSource, name: &str) -> Result<Cow<'s, [u8]>, CheckpointError> {
    let expected = len_of(source, name)?;
    check_count(name, expected, source.read(name)?)
}

/// Some bytes of a tensor.
pub(super) fn bytes_in<'s>(
    source: &'s dyn TensorSource,
    name: &str,
    range: Range<usize>,
) -> Result<Cow<'s, [u8]>, CheckpointError> {
    let expected = range.len();
    check_count(name, expected, source.read_range(name, range)?)
}

fn check_count<'s>(name: &str, expected: usize, bytes: Cow<'s, [u8]>) -> Result<Cow<'s, [u8]>, CheckpointError> {
    if bytes.len() == expected {
        return Ok(bytes);
    }
    Err(CheckpointError::Bytes { what: name.to_owned(), expected: expected as u64, got: bytes.len() as u64 })
}

/// The bytes of a tensor, owned.
pub(super) fn owned_bytes(source: &dyn TensorSource, name: &str) -> Result<Vec<u8>, CheckpointError> {
    match bytes_of(source, name)? {
        Cow::Owned(bytes) => Ok(bytes),
        Cow::Borrowed(bytes) => {
            let mut owned = with_room(name, bytes.len())?;
            owned.extend_from_slice(bytes);
            Ok(owned)
        }
    }
}

/// An empty vector with room for `len` values.
pub(super) fn with_room<T>(what: &str, len: usize) -> Result<Vec<T>, CheckpointError> {
    let mut values = Vec::new();
    make_room(what, &mut values, len)?;
    Ok(values)
}

/// Room for `more` values.
pub(super) fn make_room<T>(what: &str, values: &mut Vec<T>, more: usize) -> Result<(), CheckpointError> {
    values.try_reserve(more).map_err(|_| no_memory(what, more.saturating_mul(size_of::<T>())))
}

fn no_memory(what: &str, bytes: usize) -> CheckpointError {
    CheckpointError::Memory { what: what.to_owned(), bytes: bytes as u64 }
}

/// `Ok` if the tensor has this shape.
pub(super) fn check_shape(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
    let info = info_of(source, name)?;
    if info.shape == shape {
        return Ok(());
    }
    Err(CheckpointError::Shape { tensor: name.to_owned(), expected: shape.to_vec(), got: info.shape.clone() })
}

/// `Ok` if the tensor is a vector of this type and length.
pub(super) fn check_vector(
    source: &dyn TensorSource,
    name: &str,
    dtype: Dtype,
    expected: &'static str,
    len: usize,
) -> Result<(), CheckpointError> {
    let got = info_of(source, name)?.dtype;
    if got != dtype {
        return Err(CheckpointError::Type { tensor: name.to_owned(), expected, got });
    }
    check_shape(source, name, &[len])
}

/// The type of a tensor's values, and the one to write them in: they differ for F64, which is read rounded to f32 once.
pub(super) fn float_type(name: &str, dtype: Dtype) -> Result<FloatType, CheckpointError> {
    match FloatType::from_dtype(dtype) {
        Some(float) => Ok(float),
        None if dtype == Dtype::F64 => Ok(FloatType::F32),
        None => {
            let tensor: String = name.to_owned();
            Err(CheckpointError::Type { tensor, expected: "F32, F16, BF16 or F64", got: dtype })
        }
    }
}

/// Appends the values of bytes of any float type: exact but for F64, which is rounded to f32 once.
pub(super) fn extend_floats(
    name: &str,
    dtype: Dtype,
    bytes: &[u8],
    values: &mut Vec<f32>,
) -> Result<(), CheckpointError> {
    let float = float_type(name, dtype)?;
    make_room(name, values, bytes.len() * 8 / dtype.bitsize())?;
    if dtype == Dtype::F64 {
        #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
        values.extend(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32));
    } else {
        float.extend_values(bytes, values);
    }
    Ok(())
}

/// The values of a tensor of any float type, and the type to write them in.
pub(super) fn read_floats(source: &dyn TensorSource, name: &str) -> Result<(Vec<f32>, FloatType), CheckpointError> {
    let dtype = info_of(source, name)?.dtype;
    let float = float_type(name, dtype)?;
    let mut values = Vec::new();
    extend_floats(name, dtype, &bytes_of(source, name)?, &mut values)?;
    Ok((values, float))
}

/// The values of a tensor that must be F32 and have this many.
pub(super) fn read_f32(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
    check_vector(source, name, Dtype::F32, "F32", len)?;
    Ok(read_floats(source, name)?.0)
}
