//! A safetensors file, read whole, with typed access.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use nf4::{Float, bf16, f16};
use safetensors::{Dtype, SafeTensors};

/// An element type that a file can hold, and its bits for comparison.
pub(crate) trait Element: Copy + core::fmt::Debug {
    const DTYPE: Dtype;
    fn from_le(bytes: &[u8]) -> Self;
    fn bits(self) -> u64;
    fn is_nan(self) -> bool;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $bits:expr, $is_nan:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;
            fn from_le(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap())
            }
            fn bits(self) -> u64 {
                u64::from($bits(self))
            }
            fn is_nan(self) -> bool {
                $is_nan(self)
            }
        }
    };
}

element!(u8, U8, u8::from, never);
element!(i64, I64, i64::cast_unsigned, never);
element!(f16, F16, f16::to_bits, f16::is_nan);
element!(bf16, BF16, bf16::to_bits, bf16::is_nan);
element!(f32, F32, f32::to_bits, f32::is_nan);
element!(f64, F64, f64::to_bits, f64::is_nan);

/// No integer is a NaN.
fn never<T>(_: T) -> bool {
    false
}

/// Evaluates `$body` with `$type` naming the float type of weights that `$dtype` stands for.
macro_rules! with_float {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            safetensors::Dtype::F32 => {
                type $type = f32;
                $body
            }
            safetensors::Dtype::F16 => {
                type $type = nf4::f16;
                $body
            }
            safetensors::Dtype::BF16 => {
                type $type = nf4::bf16;
                $body
            }
            other => panic!("weights of type {other:?}"),
        }
    };
}
pub(crate) use with_float;

/// One tensor.
#[derive(Debug)]
pub(crate) struct Tensor {
    /// File and name, for messages.
    origin: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    /// The elements; the tensor must be of this very type.
    pub(crate) fn values<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE, "type of {}", self.origin);
        self.bytes.chunks_exact(size_of::<T>()).map(T::from_le).collect()
    }

    /// The elements of a tensor of any of the weights' float types, as f32; exact.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        with_float!(self.dtype, T => self.values::<T>().into_iter().map(|x| x.to_f32()).collect())
    }

    /// The only element.
    pub(crate) fn scalar<T: Element>(&self) -> T {
        let values = self.values();
        assert_eq!(values.len(), 1, "number of elements of {}", self.origin);
        values[0]
    }

    /// The bytes, whatever type they are said to be of.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Rows and columns: everything before the last dimension, and the last one.
    pub(crate) fn matrix_shape(&self) -> (usize, usize) {
        let (cols, outer) = self.shape.split_last().unwrap_or((&1, &[]));
        (outer.iter().product(), *cols)
    }
}

/// All tensors of a file.
#[derive(Debug)]
pub(crate) struct Tensors {
    path: String,
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Tensors {
    pub(crate) fn load(path: &Path) -> Self {
        let path_name = path.display().to_string();
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{path_name}: {e}"));
        let parsed = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{path_name}: {e}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = parsed
            .iter()
            .map(|(name, view)| {
                let origin = format!("{path_name}: {name}");
                let (shape, bytes) = (view.shape().to_vec(), view.data().to_vec());
                (name.to_owned(), Tensor { origin, dtype: view.dtype(), shape, bytes })
            })
            .collect();
        let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        Self { path: path_name, tensors, metadata }
    }

    /// The tensor of this name; panics with the file's path if there is none.
    pub(crate) fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.path))
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(crate) fn values<T: Element>(&self, name: &str) -> Vec<T> {
        self.get(name).values()
    }

    /// Names and tensors, sorted by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The file's own metadata.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }
}
