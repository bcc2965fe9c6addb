//! Weights to packed codes and back, and double quantization.

use super::Kernels;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::format::{BlockSize, NESTED_BLOCK, packed_len};
use crate::matrix::Nf4Matrix;

/// Conversions.
impl Kernels {
    /// Quantizes a flat tensor, bit for bit as `bitsandbytes` does on a CPU.
    ///
    /// `packed` receives two codes per byte ([`packed_len`] bytes), the first in the high half; an odd number of codes is
    /// padded with 7, the code of zero. `absmax` receives one value per block; the last block may be partial.
    ///
    /// If a block contains NaN, its absmax is NaN and all its codes are 15. If it contains infinity, its absmax is
    /// infinite, the codes of infinite values of either sign are 15, and those of finite ones 7. A block of zeros has
    /// absmax 0 (`1e-38` if it is partial) and codes 7.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `packed` or `absmax` has the wrong length.
    #[doc(alias("quantize_4bit", "quantize_blockwise"))]
    pub fn quantize<T: Float>(
        &self,
        weights: &[T],
        block_size: BlockSize,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("packed codes", packed_len(weights.len()), packed.len())?;
        check_len("absmax", block_size.blocks(weights.len()), absmax.len())?;
        let quantize = T::pick(self.table).quantize;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { quantize(weights, block_size.get(), packed, absmax) };
        Ok(())
    }

    /// Dequantizes the weights, row-major `[rows, cols]`: `CODEBOOK[code] * absmax`, rounded to f32, and for `f16` and
    /// `bf16` rounded once more, to nearest even. The bits are those of `bitsandbytes`, except that every NaN is the quiet
    /// NaN of [`Float::from_f32`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `out` does not have `rows * cols` elements.
    #[doc(alias = "dequantize_4bit")]
    pub fn dequantize<T: Float>(&self, matrix: &Nf4Matrix<'_>, out: &mut [T]) -> Result<(), ShapeError> {
        check_len("dequantized weights", matrix.rows() * matrix.cols(), out.len())?;
        let dequantize = T::pick(self.table).dequantize;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { dequantize(matrix, out) };
        Ok(())
    }

    /// Quantizes the absmax of a tensor to 8 bits (double quantization), bit for bit as `bitsandbytes` does on a CPU, and
    /// returns the offset, which is their mean.
    ///
    /// `codes` receives one byte per value, `nested_absmax` one f32 per [`NESTED_BLOCK`] codes; the quant map is
    /// [`DYNAMIC_MAP`](crate::DYNAMIC_MAP). The mean is summed in the order of `PyTorch` on one thread.
    ///
    /// NaN or infinity makes the offset NaN or infinite; then every code is 0 and every nested absmax is NaN. The mean of no
    /// values is NaN.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `codes` or `nested_absmax` has the wrong length.
    #[doc(alias("compress_statistics", "double_quant"))]
    pub fn quantize_absmax(
        &self,
        absmax: &[f32],
        codes: &mut [u8],
        nested_absmax: &mut [f32],
    ) -> Result<f32, ShapeError> {
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        let offset = unsafe { (self.table.mean)(absmax) };
        self.quantize_absmax_with_offset(absmax, offset, codes, nested_absmax)?;
        Ok(offset)
    }

    /// Like [`Self::quantize_absmax`], with a given offset.
    ///
    /// The codes of a nested block that contains NaN or infinity are 0, and its nested absmax is NaN.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `codes` or `nested_absmax` has the wrong length.
    pub fn quantize_absmax_with_offset(
        &self,
        absmax: &[f32],
        offset: f32,
        codes: &mut [u8],
        nested_absmax: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("absmax codes", absmax.len(), codes.len())?;
        check_len("nested absmax", absmax.len().div_ceil(NESTED_BLOCK), nested_absmax.len())?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (self.table.quantize_absmax)(absmax, offset, codes, nested_absmax) };
        Ok(())
    }
}
