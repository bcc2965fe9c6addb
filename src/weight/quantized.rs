//! A matrix of NF4 weights, and its storage.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use nf4_kernels::{BlockSize, Float, Nf4Matrix, ShapeError, packed_len};

use crate::buffer::zeros;
use crate::error::{Error, check_finite, check_matrix};
use crate::parallel::Executor;
use crate::weight::absmax::AbsmaxBuf;
use crate::weight::store::Store;

/// A matrix of NF4 weights `[rows, cols]`: packed codes and the scales of their blocks. It is the base weight of a
/// [`QLoRALayer`](crate::QLoRALayer).
///
/// The bytes are owned, static or shared ([`Store`]). Every scale is finite, and so is every weight. [`Self::view`]
/// borrows the matrix for [`Kernels`](nf4_kernels::Kernels).
///
/// ```
/// use nf4::{BlockSize, Quantized4Bit};
/// let weights: Vec<f32> = (0..64 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
/// let plain = Quantized4Bit::quantize(&weights, 64, 256, BlockSize::B64, false)?;
/// let nested = Quantized4Bit::quantize(&weights, 64, 256, BlockSize::B64, true)?;
/// assert_eq!(plain.bits_per_weight(), 4.5); // 4 + 32/64
/// assert_eq!(nested.bits_per_weight(), 4.126953125); // 4 + 8/64 + 32/(64 * 256)
/// # Ok::<(), nf4::Error>(())
/// ```
///
/// Weights in a mapped file stay there:
///
/// ```
/// use std::sync::Arc;
/// use nf4::{AbsmaxBuf, BlockSize, Quantized4Bit, SharedBytes, Store};
/// # let bytes = vec![0_u8; 512 + 64];
/// let file: SharedBytes = Arc::new(bytes); // 16 x 64 codes, then a scale for each of 16 blocks
/// let packed = Store::<u8>::shared(file.clone(), 0..512)?;
/// let absmax = AbsmaxBuf::plain(Store::<f32>::shared(file, 512..576)?);
/// let weight = Quantized4Bit::from_parts(packed, absmax, 16, 64, BlockSize::B64)?;
/// # Ok::<(), nf4::Error>(())
/// ```
#[doc(alias = "Params4bit")]
#[derive(Debug, Clone)]
pub struct Quantized4Bit {
    packed: Store<u8>,
    absmax: AbsmaxBuf,
    rows: usize,
    cols: usize,
    block_size: BlockSize,
}

/// Construction.
impl Quantized4Bit {
    /// Quantizes row-major weights `[rows, cols]` and, with `double_quant`, their scales too, bit for bit as `bitsandbytes`
    /// does on a CPU (whose default block size is 64).
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if there are not `rows * cols` weights; [`Error::NotFinite`] if one of them is NaN or
    /// infinite, or if they are so large (above `1e30`, say) that their double-quantized scales are not finite;
    /// [`Error::Shape`] if `rows * cols` does not fit in `usize`; [`Error::OutOfMemory`].
    #[doc(alias("quantize_4bit", "compress_statistics", "bnb_4bit_use_double_quant"))]
    pub fn quantize<T: Float>(
        weights: &[T],
        rows: usize,
        cols: usize,
        block_size: BlockSize,
        double_quant: bool,
    ) -> Result<Self, Error> {
        check_matrix("base weight", weights, rows, cols)?;
        let mut packed = zeros(1, packed_len(weights.len()))?;
        let mut absmax = zeros(1, block_size.blocks(weights.len()))?;
        Executor::detect().quantize(weights, block_size, &mut packed, &mut absmax)?;
        // The absmax of a block is finite if and only if its weights are, and there are fewer of them to check.
        if !absmax.iter().all(|a: &f32| a.is_finite()) {
            check_finite("base weight", weights)?;
        }
        let absmax = if double_quant { AbsmaxBuf::double_quantize(&absmax)? } else { AbsmaxBuf::plain(absmax) };
        Self::from_parts(packed, absmax, rows, cols, block_size)
    }

    /// Joins packed codes, two per byte with the first in the high half, and the scales of their blocks.
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows * cols` does not fit in `usize`, if there are not `ceil(rows * cols / 2)` bytes of codes, or
    /// not one scale for each block; [`Error::NotFinite`] with the index of the block if a scale is NaN or infinite.
    pub fn from_parts(
        packed: impl Into<Store<u8>>,
        absmax: AbsmaxBuf,
        rows: usize,
        cols: usize,
        block_size: BlockSize,
    ) -> Result<Self, Error> {
        let weight = Self { packed: packed.into(), absmax, rows, cols, block_size };
        let absmax = weight.try_view()?.absmax();
        for index in 0..absmax.len() {
            let value = absmax.get(index);
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "absmax", index, value });
            }
        }
        Ok(weight)
    }
}

/// Weights.
impl Quantized4Bit {
    /// A borrowed view of the matrix, for [`Kernels`](nf4_kernels::Kernels).
    ///
    /// # Panics
    /// If the owner of shared bytes no longer returns the bytes that it did.
    #[must_use]
    pub fn view(&self) -> Nf4Matrix<'_> {
        self.try_view().expect("the constructor checked the lengths")
    }

    /// Like [`Self::view`], but returns an error.
    pub(crate) fn try_view(&self) -> Result<Nf4Matrix<'_>, ShapeError> {
        Nf4Matrix::new(self.packed.as_slice(), self.absmax.try_view()?, self.rows, self.cols, self.block_size)
    }

    /// Dequantizes all weights, row-major `[rows, cols]`: `CODEBOOK[code] * absmax`, rounded once to `T`.
    ///
    /// # Panics
    /// If the result does not fit in memory. [`Self::dequantize_rows`] dequantizes in parts.
    #[doc(alias = "dequantize_4bit")]
    #[must_use]
    pub fn dequantize<T: Float>(&self) -> Vec<T> {
        let mut out = vec![T::from_f32(0.0); self.rows * self.cols];
        self.dequantize_rows(0..self.rows, &mut out).expect("`out` was made for all rows");
        out
    }

    /// Dequantizes the weights of some rows, row-major, into `out`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no such rows or `out` does not have `rows.len() * self.cols()` elements.
    pub fn dequantize_rows<T: Float>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), Error> {
        Ok(Executor::detect().dequantize(&self.try_view()?.row_range(rows)?, out)?)
    }
}

/// Accessors.
impl Quantized4Bit {
    /// Number of rows (outputs).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of weights.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no weights.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of weights in a block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Whether the scales are double-quantized.
    #[must_use]
    pub fn is_double_quantized(&self) -> bool {
        self.absmax.is_nested()
    }

    /// The packed codes, two per byte, the first in the high half.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        self.packed.as_slice()
    }

    /// The scales of the blocks.
    #[must_use]
    pub fn absmax(&self) -> &AbsmaxBuf {
        &self.absmax
    }

    /// Bytes of packed codes and scales, whether owned, static or shared.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.packed().len() + self.absmax.data_bytes()
    }

    /// The part of [`Self::data_bytes`] on the heap that this matrix owns: all of them, or none if they are static or
    /// shared. There is no spare capacity and no second copy.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.packed.memory_bytes() + self.absmax.memory_bytes()
    }

    /// Bits per weight, of [`Self::data_bytes`]; NaN if there are no weights.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.data_bytes() as f64 * 8.0 / self.len() as f64
    }
}
