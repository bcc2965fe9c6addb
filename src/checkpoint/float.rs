//! The float types of files, and their values as f32.

use alloc::borrow::ToOwned;
use alloc::vec::Vec;

use nf4_kernels::{Float, bf16, f16};
use safetensors::Dtype;

use super::CheckpointError;
use super::source::{TensorSource, bytes_of, info_of};

/// A float type that weights, biases and adapters are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum FloatType {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl FloatType {
    const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The name that `PyTorch` and the files made with it use: `float32`, `float16`, `bfloat16`.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// The type of this [`Self::torch_name`].
    #[must_use]
    pub fn from_torch_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.torch_name() == name)
    }

    /// The type of safetensors.
    #[must_use]
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// The type of this [`Self::dtype`].
    #[must_use]
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.dtype() == dtype)
    }

    /// Bytes of a value.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Appends values in this type, little endian, rounded once to nearest even: [`Float::from_f32`].
    pub fn extend_bytes(self, values: &[f32], bytes: &mut Vec<u8>) {
        bytes.reserve(values.len() * self.size());
        match self {
            Self::F32 => bytes.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::F16 => bytes.extend(values.iter().flat_map(|x| <f16 as Float>::from_f32(*x).to_le_bytes())),
            Self::BF16 => bytes.extend(values.iter().flat_map(|x| <bf16 as Float>::from_f32(*x).to_le_bytes())),
        }
    }

    /// The values of bytes in this type, exact; an incomplete last value is dropped.
    #[must_use]
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Self::BF16 => bytes.as_chunks().0.iter().map(|b| Float::to_f32(bf16::from_le_bytes(*b))).collect(),
        }
    }
}

/// The values of a tensor of any float type, and the type to write them back in. Exact but for F64, which is rounded to
/// f32 once.
pub(super) fn read_floats(source: &dyn TensorSource, name: &str) -> Result<(Vec<f32>, FloatType), CheckpointError> {
    let dtype = info_of(source, name)?.dtype;
    let bytes = bytes_of(source, name)?;
    match FloatType::from_dtype(dtype) {
        Some(float) => Ok((float.values(&bytes), float)),
        None if dtype == Dtype::F64 => {
            #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
            let values = bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect();
            Ok((values, FloatType::F32))
        }
        None => {
            let tensor = name.to_owned();
            Err(CheckpointError::Type { tensor, expected: "F32, F16, BF16 or F64", got: dtype })
        }
    }
}

/// The values of a tensor that must be F32 and have this many.
pub(super) fn read_f32(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
    check_vector(source, name, Dtype::F32, "F32", len)?;
    Ok(FloatType::F32.values(&bytes_of(source, name)?))
}

/// `Ok` if the tensor is a vector of this type and length.
pub(super) fn check_vector(
    source: &dyn TensorSource,
    name: &str,
    dtype: Dtype,
    expected: &'static str,
    len: usize,
) -> Result<(), CheckpointError> {
    let info = info_of(source, name)?;
    if info.dtype != dtype {
        return Err(CheckpointError::Type { tensor: name.to_owned(), expected, got: info.dtype });
    }
    if info.shape != [len] {
        let expected = alloc::vec![len];
        return Err(CheckpointError::Shape { tensor: name.to_owned(), expected, got: info.shape.clone() });
    }
    Ok(())
}
