//! What a layer will have in a file, known before its weights are read: for writers that stream.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

use nf4_kernels::{CODEBOOK, NESTED_BLOCK, packed_len};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::header::{product, tensor_bytes};
use super::names::join;
use super::quant_state::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, QuantState, STATE};

/// The longest decimal that stands for an f32: sign, 17 digits, point, exponent.
const LONGEST_OFFSET: usize = 24;

impl QuantState {
    /// Names, types and shapes of the tensors that a packed tensor of this name and state consists of in a file, as
    /// [`Linear4bit::tensors`](super::Linear4bit::tensors) has them; `data_offsets` are 0 and the number of bytes.
    ///
    /// The first is the packed one, the last the JSON. Only the length of that depends on the weights, through the offset
    /// of double-quantized scales (whose value does not matter here): the length is the largest one.
    ///
    /// # Errors
    /// [`CheckpointError::Overflow`] if the shape is too large for the address space.
    pub fn tensor_infos(&self, tensor: &str) -> Result<Vec<(String, TensorInfo)>, CheckpointError> {
        let overflow = || CheckpointError::Overflow { tensor: tensor.to_owned(), shape: self.shape.clone() };
        let elements = product(&self.shape).ok_or_else(overflow)?;
        let packed = packed_len(elements) / (self.quant_storage.bitsize() / 8).max(1);
        let blocks = self.block_size.blocks(elements);
        let json = Self { nested_offset: self.nested_offset.and(Some(0.0)), ..self.clone() }.to_json();
        let mut infos = Vec::new();
        let mut add = |part: Option<&str>, dtype: Dtype, shape: &[usize]| {
            let (name, shape) = (part.map_or_else(|| tensor.to_owned(), |part| join(tensor, part)), shape.to_vec());
            let data_offsets = (0, tensor_bytes(&name, dtype, &shape)?);
            infos.push((name, TensorInfo { dtype, shape, data_offsets }));
            Ok::<_, CheckpointError>(())
        };
        add(None, self.quant_storage, &[packed, 1])?;
        add(Some(QUANT_MAP), Dtype::F32, &[CODEBOOK.len()])?;
        if self.nested_offset.is_some() {
            add(Some(ABSMAX), Dtype::U8, &[blocks])?;
            add(Some(NESTED_ABSMAX), Dtype::F32, &[blocks.div_ceil(NESTED_BLOCK)])?;
            add(Some(NESTED_QUANT_MAP), Dtype::F32, &[256])?;
        } else {
            add(Some(ABSMAX), Dtype::F32, &[blocks])?;
        }
        add(Some(STATE), Dtype::U8, &[json.len() + if self.nested_offset.is_some() { LONGEST_OFFSET } else { 0 }])?;
        Ok(infos)
    }
}
