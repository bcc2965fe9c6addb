//! What a `bitsandbytes` layer says of its packed weight.
//!
//! The names of the tensors and of the fields are those of `QuantState.as_dict(packed=True)` in
//! `bitsandbytes/functional.py` (0.43 to 0.50). The JSON is what Python's `json.dumps` makes of the fields that are not
//! tensors, in that order; a layer that this module writes has the same bytes.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use nf4_kernels::{BlockSize, NESTED_BLOCK, packed_len};
use safetensors::Dtype;

use super::float::{FloatType, check_vector};
use super::header::{product, tensor_bytes};
use super::json::{Object, python_float, to_usize};
use super::source::{TensorSource, bytes_of, info_of};
use super::{CheckpointError, join};

/// The tensor that holds the JSON, after the name of the weight.
pub(super) const STATE: &str = "weight.quant_state.bitsandbytes__nf4";
/// The same of FP4.
pub(super) const STATE_FP4: &str = "weight.quant_state.bitsandbytes__fp4";
pub(super) const WEIGHT: &str = "weight";
pub(super) const ABSMAX: &str = "weight.absmax";
pub(super) const QUANT_MAP: &str = "weight.quant_map";
pub(super) const NESTED_ABSMAX: &str = "weight.nested_absmax";
pub(super) const NESTED_QUANT_MAP: &str = "weight.nested_quant_map";

/// The tensors of a layer that a dense one does not have.
pub(super) const COMPANIONS: [&str; 5] = [STATE, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP];

/// The description of a `bnb.nn.Linear4bit` layer: all that can be known without reading weights.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// The shape of the weight before it was packed.
    pub shape: Vec<usize>,
    /// Weights in a block.
    pub block_size: BlockSize,
    /// The type of the weight before it was quantized, which `bitsandbytes` restores it to.
    pub dtype: FloatType,
    /// The type that the packed bytes are said to have, `U8` unless `quant_storage` was set.
    pub quant_storage: Dtype,
    /// The offset of double-quantized scales; `None` if they are plain.
    pub nested_offset: Option<f32>,
}

impl QuantState {
    /// The state of the layer with this prefix (`model.layers.0.mlp.up_proj`; empty for a file with one layer). Only
    /// the JSON is read; type and shape of every tensor of the layer are checked against it.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] for FP4; [`CheckpointError::Missing`], [`CheckpointError::Type`],
    /// [`CheckpointError::Shape`] or [`CheckpointError::Bytes`] for a tensor; [`CheckpointError::Json`] and
    /// [`CheckpointError::Field`] for the JSON; [`CheckpointError::Overflow`] for its shape.
    pub fn load(source: &dyn TensorSource, prefix: &str) -> Result<Self, CheckpointError> {
        let name = join(prefix, STATE);
        if source.info(&name).is_none() && source.info(&join(prefix, STATE_FP4)).is_some() {
            return Err(CheckpointError::Unsupported { what: join(prefix, WEIGHT), variant: "FP4".to_owned() });
        }
        let nested = source.info(&join(prefix, NESTED_ABSMAX)).is_some();
        let packed = info_of(source, &join(prefix, WEIGHT))?;
        let state = Self::parse(&name, &bytes_of(source, &name)?, nested, packed.dtype)?;
        state.check_tensors(source, prefix, &name)?;
        Ok(state)
    }

    /// Parses the JSON in the tensor `name`.
    fn parse(name: &str, json: &[u8], nested: bool, quant_storage: Dtype) -> Result<Self, CheckpointError> {
        let object = Object::parse(name, json)?;
        object.require("quant_type", "\"nf4\"", |v| (v == "nf4").then_some(()))?;
        let block_size = object
            .require("blocksize", "32, 64, 128, 256, 512, 1024, 2048 or 4096", |v| BlockSize::new(to_usize(v)?).ok())?;
        let dtype =
            object.require("dtype", "float32, float16 or bfloat16", |v| FloatType::from_torch_name(v.as_str()?))?;
        let shape = object
            .require("shape", "a list of sizes", |v| v.as_array()?.iter().map(to_usize).collect::<Option<Vec<_>>>())?;
        let nested = nested || object.get("nested_offset").is_some();
        let nested_offset = if nested { Some(nested_offset(&object)?) } else { None };
        Ok(Self { shape, block_size, dtype, quant_storage, nested_offset })
    }

    /// Checks type and shape of every tensor of the layer but the bias.
    fn check_tensors(&self, source: &dyn TensorSource, prefix: &str, state: &str) -> Result<(), CheckpointError> {
        let overflow = || CheckpointError::Overflow { tensor: state.to_owned(), shape: self.shape.clone() };
        let elements = product(&self.shape).ok_or_else(overflow)?;
        let packed = info_of(source, &join(prefix, WEIGHT))?;
        let (expected, got) = (packed_len(elements), tensor_bytes(prefix, packed.dtype, &packed.shape)?);
        if expected != got {
            let what = format!("{} for {:?} weights", join(prefix, WEIGHT), self.shape);
            return Err(CheckpointError::Bytes { what, expected: expected as u64, got: got as u64 });
        }
        let blocks = self.block_size.blocks(elements);
        check_vector(source, &join(prefix, QUANT_MAP), Dtype::F32, "F32", 16)?;
        if self.nested_offset.is_some() {
            check_vector(source, &join(prefix, ABSMAX), Dtype::U8, "U8, as nested_absmax needs", blocks)?;
            check_vector(source, &join(prefix, NESTED_ABSMAX), Dtype::F32, "F32", blocks.div_ceil(NESTED_BLOCK))?;
            check_vector(source, &join(prefix, NESTED_QUANT_MAP), Dtype::F32, "F32", 256)
        } else {
            check_vector(source, &join(prefix, ABSMAX), Dtype::F32, "F32, without nested_absmax", blocks)
        }
    }

    /// Rows and columns of the matrix that `y = x W^T` takes: the product of all dimensions before the last, and the
    /// last.
    ///
    /// # Errors
    /// [`CheckpointError::Overflow`] if the number of weights does not fit in `usize`.
    pub fn matrix_shape(&self) -> Result<[usize; 2], CheckpointError> {
        let (cols, outer) = self.shape.split_last().unwrap_or((&1, &[]));
        let overflow = || CheckpointError::Overflow { tensor: WEIGHT.to_owned(), shape: self.shape.clone() };
        let rows = product(outer).filter(|rows| rows.checked_mul(*cols).is_some());
        Ok([rows.ok_or_else(overflow)?, *cols])
    }

    /// The JSON, with the bytes that `bitsandbytes` writes.
    pub(super) fn to_json(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(|dim| format!("{dim}")).collect();
        let nested = self.nested_offset.map_or(String::new(), |offset| {
            let offset = python_float(f64::from(offset));
            format!(
                ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
            )
        });
        format!(
            "{{\"quant_type\": \"nf4\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": [{}]{nested}}}",
            self.block_size.get(),
            self.dtype.torch_name(),
            shape.join(", "),
        )
    }
}

/// The offset of double quantization: a decimal that is an f32 exactly. The other fields have but one value that
/// `bitsandbytes` writes.
fn nested_offset(object: &Object<'_>) -> Result<f32, CheckpointError> {
    object.require("nested_blocksize", "256", |v| (to_usize(v)? == NESTED_BLOCK).then_some(()))?;
    object.require("nested_dtype", "\"float32\"", |v| (v == "float32").then_some(()))?;
    object.require("nested_offset", "a finite number", |v| {
        #[allow(clippy::cast_possible_truncation, reason = "the file has an f32, written as a decimal")]
        let offset = v.as_f64()? as f32;
        offset.is_finite().then_some(offset)
    })
}
