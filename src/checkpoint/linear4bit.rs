//! `bnb.nn.Linear4bit` layers.

use alloc::borrow::ToOwned;
use alloc::vec::Vec;

use nf4_kernels::{Absmax, CODEBOOK};
use safetensors::Dtype;

use super::error::CheckpointError;
use super::float::FloatType;
use super::names::join;
use super::quant_state::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, QuantState, STATE};
use super::read::{check_shape, read_f32, read_floats};
use super::shared::{store_bytes, store_f32};
use super::source::{TensorData, TensorMap, TensorSource};
use crate::error::{check_finite, check_len};
use crate::weight::absmax::AbsmaxBuf;
use crate::weight::quantized::Quantized4Bit;

/// The parts of a layer.
const WEIGHT: &str = "weight";
const BIAS: &str = "bias";

/// A 4-bit layer in a file of `bitsandbytes`: the packed weight, the bias, and what is needed to write the same bytes again.
#[derive(Debug, Clone)]
pub struct Linear4bit {
    weight: Quantized4Bit,
    state: QuantState,
    bias: Option<(Vec<f32>, FloatType)>,
}

/// Reading.
impl Linear4bit {
    /// Reads the layer with this prefix (`model.layers.0.mlp.up_proj`; empty for a file with one layer).
    ///
    /// Scales may be double-quantized; they are then decoded with the quant map in the file. The packed bytes may have any
    /// type, and a bias any float type (F64 is rounded to f32). A weight that is not a matrix becomes one as
    /// [`QuantState::matrix_shape`] says.
    ///
    /// # Errors
    /// * [`CheckpointError::Unsupported`] for FP4 and for what is not known;
    /// * [`CheckpointError::Missing`], [`CheckpointError::Type`], [`CheckpointError::Shape`] or [`CheckpointError::Bytes`] for
    ///   a tensor;
    /// * [`CheckpointError::Json`], [`CheckpointError::Field`] and [`CheckpointError::Overflow`] for the quantization state;
    /// * [`CheckpointError::Codebook`] if it is not that of NF4;
    /// * [`CheckpointError::Layer`] for a scale or bias that is NaN or infinite;
    /// * [`CheckpointError::Memory`].
    pub fn load(source: &dyn TensorSource, prefix: &str) -> Result<Self, CheckpointError> {
        let layer = Self::load_tensor(source, &join(prefix, WEIGHT))?;
        let bias = join(prefix, BIAS);
        if source.info(&bias).is_none() {
            return Ok(layer);
        }
        check_shape(source, &bias, &[layer.weight.rows()])?;
        let (values, float) = read_floats(source, &bias)?;
        layer.with_bias(values, float).map_err(|error| CheckpointError::Layer { layer: bias, error })
    }

    /// Reads the packed tensor with this name, which need not end in `.weight` ([`packed_tensors`] lists them), without a
    /// bias.
    ///
    /// # Errors
    /// * [`CheckpointError::Unsupported`] for FP4 and for what is not known;
    /// * [`CheckpointError::Missing`], [`CheckpointError::Type`], [`CheckpointError::Shape`] or [`CheckpointError::Bytes`] for
    ///   a tensor;
    /// * [`CheckpointError::Json`], [`CheckpointError::Field`] and [`CheckpointError::Overflow`] for the quantization state;
    /// * [`CheckpointError::Codebook`] if it is not that of NF4;
    /// * [`CheckpointError::Layer`] for a scale that is NaN or infinite;
    /// * [`CheckpointError::Memory`].
    ///
    /// [`packed_tensors`]: super::packed_tensors
    pub fn load_tensor(source: &dyn TensorSource, tensor: &str) -> Result<Self, CheckpointError> {
        let state = QuantState::load(source, tensor)?;
        let [rows, cols] = state.matrix_shape()?;
        check_codebook(source, &join(tensor, QUANT_MAP))?;
        let layer_error = |error| CheckpointError::Layer { layer: tensor.to_owned(), error };
        let absmax = match state.nested_offset {
            None => AbsmaxBuf::plain(store_f32(source, &join(tensor, ABSMAX), state.block_size.blocks(rows * cols))?),
            Some(offset) => read_nested(source, tensor, offset)?,
        };
        let packed = store_bytes(source, tensor)?;
        check_storage(tensor, packed.as_slice().len(), state.quant_storage)?;
        let weight = Quantized4Bit::from_parts(packed, absmax, rows, cols, state.block_size).map_err(layer_error)?;
        Ok(Self { weight, state, bias: None })
    }
}

/// Writing.
impl Linear4bit {
    /// A layer with this weight and without a bias. `dtype` is the type of the weight before quantization, to which
    /// `bitsandbytes` dequantizes it; the packed bytes are stored as `U8`.
    #[must_use]
    pub fn new(weight: Quantized4Bit, dtype: FloatType) -> Self {
        let nested_offset = match weight.absmax().view() {
            // Without blocks there is no mean.
            Absmax::Nested(nested) if nested.codes().is_empty() => Some(0.0),
            Absmax::Nested(nested) => Some(nested.offset()),
            _ => None,
        };
        let shape = alloc::vec![weight.rows(), weight.cols()];
        let (block_size, quant_storage) = (weight.block_size(), Dtype::U8);
        Self { weight, state: QuantState { shape, block_size, dtype, quant_storage, nested_offset }, bias: None }
    }

    /// Sets the bias, `[rows]`, which is written in the type `dtype`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `bias` does not have `rows` values; [`crate::Error::NotFinite`] if one of them is NaN or
    /// infinite.
    pub fn with_bias(self, bias: Vec<f32>, dtype: FloatType) -> Result<Self, crate::Error> {
        check_len("bias", self.weight.rows(), bias.len())?;
        check_finite("bias", &bias)?;
        Ok(Self { bias: Some((bias, dtype)), ..self })
    }

    /// Sets the type that the file states for the packed bytes; for instance `BF16` for `FSDP`, which needs the same type for
    /// all tensors.
    ///
    /// # Errors
    /// [`CheckpointError::Type`] for a type of less than a byte; [`CheckpointError::Bytes`] if the packed bytes are not
    /// a whole number of elements.
    #[doc(alias = "bnb_4bit_quant_storage")]
    pub fn with_quant_storage(mut self, dtype: Dtype) -> Result<Self, CheckpointError> {
        check_storage("packed codes", self.weight.packed().len(), dtype)?;
        self.state.quant_storage = dtype;
        Ok(self)
    }

    /// The tensors of the layer, with the names and bytes that `bitsandbytes` would write. The packed codes are borrowed.
    ///
    /// The quant map of double quantization is that of the layer: [`DYNAMIC_MAP`], unless the layer came from a file with
    /// another one.
    ///
    /// [`DYNAMIC_MAP`]: nf4_kernels::DYNAMIC_MAP
    #[must_use]
    pub fn tensors(&self, prefix: &str) -> TensorMap<'_> {
        let mut tensors = TensorMap::new();
        let weight = join(prefix, WEIGHT);
        let packed = self.weight.packed();
        let dtype = self.state.quant_storage;
        // `with_quant_storage` and `load` made sure that the bytes are whole elements.
        let shape = alloc::vec![packed.len() / (dtype.bitsize() / 8), 1];
        let mut add = |part: &str, tensor| tensors.insert(join(&weight, part), tensor);
        add(QUANT_MAP, TensorData::floats(&CODEBOOK, FloatType::F32));
        add(STATE, TensorData::u8(self.state.to_json().into_bytes()));
        match self.weight.absmax().view() {
            Absmax::Nested(nested) => {
                add(ABSMAX, TensorData::u8(nested.codes()));
                add(NESTED_ABSMAX, TensorData::floats(nested.absmax(), FloatType::F32));
                add(NESTED_QUANT_MAP, TensorData::floats(nested.quant_map(), FloatType::F32));
            }
            Absmax::Plain(absmax) => {
                add(ABSMAX, TensorData::floats(absmax, FloatType::F32));
            }
            _ => {}
        }
        tensors.insert(weight, TensorData::from_parts(dtype, shape, packed));
        if let Some((bias, float)) = &self.bias {
            tensors.insert(join(prefix, BIAS), TensorData::floats(bias, *float));
        }
        tensors
    }
}

/// Accessors.
impl Linear4bit {
    /// The weight, as a matrix.
    #[must_use]
    pub fn weight(&self) -> &Quantized4Bit {
        &self.weight
    }

    /// The bias.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(|(values, _)| values.as_slice())
    }

    /// The description: original shape and type, block size, offset.
    #[must_use]
    pub fn state(&self) -> &QuantState {
        &self.state
    }

    /// Weight and bias.
    #[must_use]
    pub fn into_parts(self) -> (Quantized4Bit, Option<Vec<f32>>) {
        (self.weight, self.bias.map(|(values, _)| values))
    }
}

/// `Ok` if this number of packed bytes is a whole number of elements of a type.
fn check_storage(tensor: &str, bytes: usize, dtype: Dtype) -> Result<(), CheckpointError> {
    let bits = dtype.bitsize();
    if !bits.is_multiple_of(8) {
        let expected = "a type of whole bytes";
        return Err(CheckpointError::Type { tensor: tensor.to_owned(), expected, got: dtype });
    }
    if !bytes.is_multiple_of(bits / 8) {
        let what = alloc::format!("{tensor} as {dtype}");
        let expected = bytes.next_multiple_of(bits / 8) as u64;
        return Err(CheckpointError::Bytes { what, expected, got: bytes as u64 });
    }
    Ok(())
}

fn read_nested(source: &dyn TensorSource, tensor: &str, offset: f32) -> Result<AbsmaxBuf, CheckpointError> {
    let codes = store_bytes(source, &join(tensor, ABSMAX))?;
    let (name, map_name) = (join(tensor, NESTED_ABSMAX), join(tensor, NESTED_QUANT_MAP));
    let absmax = store_f32(source, &name, codes.as_slice().len().div_ceil(nf4_kernels::NESTED_BLOCK))?;
    let map = read_f32(source, &map_name, 256)?;
    let error = |error| CheckpointError::Layer { layer: name.clone(), error };
    check_len("nested quant map", 256, map.len()).map_err(error)?;
    AbsmaxBuf::nested(codes, absmax, &core::array::from_fn(|i| map[i]), offset).map_err(error)
}

/// The kernels know one codebook.
fn check_codebook(source: &dyn TensorSource, name: &str) -> Result<(), CheckpointError> {
    let codebook = read_f32(source, name, CODEBOOK.len())?;
    match (0..CODEBOOK.len()).find(|i| codebook[*i].to_bits() != CODEBOOK[*i].to_bits()) {
        None => Ok(()),
        Some(index) => {
            let (expected, got) = (CODEBOOK[index], codebook[index]);
            Err(CheckpointError::Codebook { tensor: name.to_owned(), index, expected, got })
        }
    }
}
