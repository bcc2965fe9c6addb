//! The quantization state of a `bitsandbytes` layer, which describes its packed weight.
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

use super::error::CheckpointError;
use super::float::FloatType;
use super::header::product;
use super::json::{Object, python_float, to_usize};
use super::names::join;
use super::read::{bytes_of, check_vector, info_of, len_of};
use super::source::TensorSource;

/// The tensor that holds the JSON, after the name of the packed one.
pub(super) const STATE: &str = "quant_state.bitsandbytes__nf4";
/// The same of FP4.
pub(super) const STATE_FP4: &str = "quant_state.bitsandbytes__fp4";
/// What the names of all of these begin with, whatever they describe.
const ANY_STATE: &str = "quant_state.bitsandbytes__";
pub(super) const ABSMAX: &str = "absmax";
pub(super) const QUANT_MAP: &str = "quant_map";
pub(super) const NESTED_ABSMAX: &str = "nested_absmax";
pub(super) const NESTED_QUANT_MAP: &str = "nested_quant_map";

/// The packed tensor that this one describes, if its name says that it does.
pub(super) fn described(name: &str) -> Option<&str> {
    if let Some((tensor, _)) = name.split_once(".quant_state.") {
        return name[tensor.len() + 1..].starts_with(ANY_STATE).then_some(tensor);
    }
    let (tensor, part) = name.rsplit_once('.')?;
    [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP].contains(&part).then_some(tensor)
}

/// The names of all tensors that `bitsandbytes` packed to 4 bits, sorted.
///
/// Usually these are weights (`up_proj.weight`), but also parameters with other names, such as those of fused experts
/// (`experts.gate_up_proj`). FP4 tensors and incomplete ones are listed too; [`QuantState::load`] returns an error for them.
#[must_use]
pub fn packed_tensors(source: &dyn TensorSource) -> Vec<String> {
    let mut tensors: Vec<String> = source.names().filter_map(described).map(str::to_owned).collect();
    tensors.sort_unstable();
    tensors.dedup();
    tensors
}

/// The description of a 4-bit tensor in a file of `bitsandbytes`: its original shape and type, its block size and its kind of
/// scales. It is read without the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// The shape of the weight before it was packed.
    pub shape: Vec<usize>,
    /// The number of weights in a block.
    pub block_size: BlockSize,
    /// The type of the weight before quantization, to which `bitsandbytes` dequantizes it.
    pub dtype: FloatType,
    /// The type that the file states for the packed bytes: `U8` unless `quant_storage` was set.
    pub quant_storage: Dtype,
    /// The offset of double-quantized scales; `None` if they are plain.
    pub nested_offset: Option<f32>,
}

impl QuantState {
    /// Reads the state of the packed tensor with this name (`model.layers.0.mlp.up_proj.weight`). Only the JSON is read; the
    /// types and shapes of all tensors that belong to it are checked.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] for FP4 and for what is not known; [`CheckpointError::Missing`],
    /// [`CheckpointError::Type`], [`CheckpointError::Shape`] or [`CheckpointError::Bytes`] for a tensor;
    /// [`CheckpointError::Json`] and [`CheckpointError::Field`] for the JSON; [`CheckpointError::Overflow`] for its shape.
    pub fn load(source: &dyn TensorSource, tensor: &str) -> Result<Self, CheckpointError> {
        let name = join(tensor, STATE);
        if source.info(&name).is_none() && source.info(&join(tensor, STATE_FP4)).is_some() {
            return Err(CheckpointError::Unsupported { what: tensor.to_owned(), variant: "FP4".to_owned() });
        }
        let nested = source.info(&join(tensor, NESTED_ABSMAX)).is_some();
        let packed = info_of(source, tensor)?;
        let state = Self::parse(&name, &bytes_of(source, &name)?, nested, packed.dtype)?;
        state.check_tensors(source, tensor, &name)?;
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

    /// Checks type and shape of the packed tensor and of all that describe it.
    fn check_tensors(&self, source: &dyn TensorSource, tensor: &str, state: &str) -> Result<(), CheckpointError> {
        let overflow = || CheckpointError::Overflow { tensor: state.to_owned(), shape: self.shape.clone() };
        let elements = product(&self.shape).ok_or_else(overflow)?;
        let (expected, got) = (packed_len(elements), len_of(source, tensor)?);
        if expected != got {
            let what = format!("{tensor} for {:?} weights", self.shape);
            return Err(CheckpointError::Bytes { what, expected: expected as u64, got: got as u64 });
        }
        let blocks = self.block_size.blocks(elements);
        check_vector(source, &join(tensor, QUANT_MAP), Dtype::F32, "F32", 16)?;
        if self.nested_offset.is_some() {
            check_vector(source, &join(tensor, ABSMAX), Dtype::U8, "U8, as nested_absmax needs", blocks)?;
            check_vector(source, &join(tensor, NESTED_ABSMAX), Dtype::F32, "F32", blocks.div_ceil(NESTED_BLOCK))?;
            check_vector(source, &join(tensor, NESTED_QUANT_MAP), Dtype::F32, "F32", 256)
        } else {
            check_vector(source, &join(tensor, ABSMAX), Dtype::F32, "F32, without nested_absmax", blocks)
        }
    }

    /// The rows and columns of the weight as a matrix in `y = x W^T`: the product of all dimensions but the last, and the
    /// last.
    ///
    /// # Errors
    /// [`CheckpointError::Overflow`] if the number of weights does not fit in `usize`.
    pub fn matrix_shape(&self) -> Result<[usize; 2], CheckpointError> {
        let [rows, cols] = matrix_shape(&self.shape);
        let outer = &self.shape[..self.shape.len().saturating_sub(1)];
        match product(outer).and_then(|rows| rows.checked_mul(cols)) {
            Some(_) => Ok([rows, cols]),
            None => Err(CheckpointError::Overflow { tensor: "weight".to_owned(), shape: self.shape.clone() }),
        }
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

/// A shape as rows and columns: all dimensions but the last, and the last. Rows that do not fit are the largest number.
pub(super) fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    let (cols, outer) = shape.split_last().unwrap_or((&1, &[]));
    [outer.iter().fold(1, |rows, dim| rows.saturating_mul(*dim)), *cols]
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
