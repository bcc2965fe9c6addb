//! The float types of files, and their conversion between bytes and f32.

use alloc::vec::Vec;

use nf4_kernels::{Float, bf16, f16};
use safetensors::Dtype;

/// A float type in which files keep weights, biases and adapters.
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

    /// The type with this [`Self::torch_name`].
    #[must_use]
    pub fn from_torch_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.torch_name() == name)
    }

    /// The same type in safetensors.
    #[must_use]
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// The type with this [`Self::dtype`].
    #[must_use]
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.dtype() == dtype)
    }

    /// Bytes per value.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Appends values in this type, little endian, rounded once to nearest even: [`Float::from_f32`].
    ///
    /// If `bytes` has no room left, it grows, which aborts the process if there is no memory.
    pub fn extend_bytes(self, values: &[f32], bytes: &mut Vec<u8>) {
        bytes.reserve(values.len() * self.size());
        match self {
            Self::F32 => bytes.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::F16 => bytes.extend(values.iter().flat_map(|x| <f16 as Float>::from_f32(*x).to_le_bytes())),
            Self::BF16 => bytes.extend(values.iter().flat_map(|x| <bf16 as Float>::from_f32(*x).to_le_bytes())),
        }
    }

    /// Appends the values of bytes in this type, exact; an incomplete last value is dropped.
    ///
    /// If `values` has no room left, it grows, which aborts the process if there is no memory.
    pub fn extend_values(self, bytes: &[u8], values: &mut Vec<f32>) {
        match self {
            Self::F32 => values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Self::F16 => values.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Self::BF16 => values.extend(bytes.as_chunks().0.iter().map(|b| Float::to_f32(bf16::from_le_bytes(*b)))),
        }
    }

    /// [`Self::extend_values`] in a new vector.
    #[must_use]
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = Vec::with_capacity(bytes.len() / self.size());
        self.extend_values(bytes, &mut values);
        values
    }

    /// Whether a finite value is infinite in this type.
    pub(super) fn overflows(self, value: f32) -> bool {
        value.is_finite()
            && match self {
                Self::F32 => false,
                Self::F16 => <f16 as Float>::from_f32(value).to_f32().is_infinite(),
                Self::BF16 => Float::to_f32(<bf16 as Float>::from_f32(value)).is_infinite(),
            }
    }
}
