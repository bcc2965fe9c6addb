//! Inputs of the products with integers.

use super::Kernels;
use crate::activations::{Activations, Activations8x8};
use crate::error::ShapeError;
use crate::float::Float;
use crate::format::BlockSize;

/// Activations.
impl Kernels {
    /// Quantizes a vector for [`Self::gemv`], in buffers that the caller provides.
    ///
    /// `values` and `scales` must have the lengths [`Activations::values_len`] and [`Activations::scales_len`]. The result
    /// can be multiplied by matrices of every block size with the same group ([`BlockSize::activation_group`]). The scale of
    /// a group that contains NaN or infinity is NaN, which makes every output NaN. Inputs in f16 and bf16 give what the same
    /// numbers in f32 give.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if a buffer has the wrong length.
    pub fn quantize_activations<'a, T: Float>(
        &self,
        inputs: &'a [T],
        block_size: BlockSize,
        values: &'a mut [i16],
        scales: &'a mut [f32],
    ) -> Result<Activations<'a, T>, ShapeError> {
        self.quantize_activations_batch(inputs, inputs.len(), block_size, values, scales)
    }

    /// Quantizes a batch of vectors, `inputs` `[batch, cols]`, for [`Self::gemm`], each of them like
    /// [`Self::quantize_activations`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `cols`, or if `values` or `scales` does not
    /// have `batch` times the length that one vector needs.
    pub fn quantize_activations_batch<'a, T: Float>(
        &self,
        inputs: &'a [T],
        cols: usize,
        block_size: BlockSize,
        values: &'a mut [i16],
        scales: &'a mut [f32],
    ) -> Result<Activations<'a, T>, ShapeError> {
        let slots = self.table.slots;
        Activations::new(inputs, cols, block_size, values, scales, slots)?;
        let (values_len, scales_len) =
            (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
        // If one of them is 0, all are. Saying so lets the compiler drop the panics of `chunks`.
        if cols > 0 && values_len > 0 && scales_len > 0 {
            let vectors = inputs.chunks(cols).zip(values.chunks_mut(values_len)).zip(scales.chunks_mut(scales_len));
            for ((inputs, values), scales) in vectors {
                // SAFETY: `self` exists, so the CPU has the instruction set of its table.
                unsafe {
                    (T::pick(self.table).quantize_activations)(inputs, block_size.activation_group(), values, scales)
                };
            }
        }
        Activations::new(inputs, cols, block_size, values, scales, slots)
    }

    /// Quantizes a vector for [`Self::gemv_8x8`], in buffers that the caller provides.
    ///
    /// `values` and `scales` must have the lengths [`Activations8x8::values_len`] and [`Activations8x8::scales_len`]. The
    /// result can be multiplied by matrices of every block size. The scale of a group that contains NaN or infinity is NaN,
    /// which makes every output NaN. Inputs in f16 and bf16 give what the same numbers in f32 give.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if a buffer has the wrong length.
    pub fn quantize_activations_8x8<'a, T: Float>(
        &self,
        inputs: &'a [T],
        values: &'a mut [i8],
        scales: &'a mut [f32],
    ) -> Result<Activations8x8<'a, T>, ShapeError> {
        self.quantize_activations_8x8_batch(inputs, inputs.len(), values, scales)
    }

    /// Quantizes a batch of vectors, `inputs` `[batch, cols]`, for [`Self::gemm_8x8`], each of them like
    /// [`Self::quantize_activations_8x8`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `cols`, or if `values` or `scales` does not
    /// have `batch` times the length that one vector needs.
    pub fn quantize_activations_8x8_batch<'a, T: Float>(
        &self,
        inputs: &'a [T],
        cols: usize,
        values: &'a mut [i8],
        scales: &'a mut [f32],
    ) -> Result<Activations8x8<'a, T>, ShapeError> {
        let slots = self.table.slots_8x8;
        Activations8x8::new(inputs, cols, values, scales, slots)?;
        let (values_len, scales_len) = (Activations8x8::values_len(cols), Activations8x8::scales_len(cols));
        // One of them is 0 only if all are; the compiler needs to hear it to drop the panics of `chunks`.
        if cols > 0 && values_len > 0 && scales_len > 0 {
            let vectors = inputs.chunks(cols).zip(values.chunks_mut(values_len)).zip(scales.chunks_mut(scales_len));
            for ((inputs, values), scales) in vectors {
                // SAFETY: `self` exists, so the CPU has the instruction set of its table.
                unsafe { (T::pick(self.table).quantize_activations_8x8)(inputs, values, scales) };
            }
        }
        Activations8x8::new(inputs, cols, values, scales, slots)
    }
}
