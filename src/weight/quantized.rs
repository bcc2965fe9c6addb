//! NF4 weights that own their bytes.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use nf4_kernels::{Absmax, BlockSize, DYNAMIC_MAP, Float, Kernels, NESTED_BLOCK, NestedAbsmax, Nf4Matrix, packed_len};

use crate::buffer::zeros;
use crate::error::{Error, check_finite, check_matrix};
use crate::parallel;

/// The scales of the blocks, owned: plain, or double-quantized; never both. [`Self::view`] is the borrowed [`Absmax`].
#[derive(Debug, Clone)]
pub struct AbsmaxBuf(Storage);

#[derive(Debug, Clone)]
enum Storage {
    Plain(Box<[f32]>),
    Nested {
        codes: Box<[u8]>,
        absmax: Box<[f32]>,
        /// `None` stands for [`DYNAMIC_MAP`].
        map: Option<Box<[f32; 256]>>,
        offset: f32,
    },
}

impl AbsmaxBuf {
    /// One f32 a block.
    #[must_use]
    pub fn plain(absmax: Vec<f32>) -> Self {
        Self(Storage::Plain(absmax.into_boxed_slice()))
    }

    /// Double-quantized scales as they are in a file: one code a block, one f32 for each [`NESTED_BLOCK`] of them, the
    /// map and the offset; see [`NestedAbsmax`]. The map is kept (1 KiB) only if it differs from [`DYNAMIC_MAP`] in a
    /// bit.
    ///
    /// # Errors
    /// [`Error::Shape`] if `absmax` does not have `ceil(codes.len() / 256)` values.
    pub fn nested(codes: Vec<u8>, absmax: Vec<f32>, map: &[f32; 256], offset: f32) -> Result<Self, Error> {
        NestedAbsmax::new(&codes, map, &absmax, offset)?;
        let same = map.iter().zip(&DYNAMIC_MAP).all(|(a, b)| a.to_bits() == b.to_bits());
        Ok(Self(Storage::Nested {
            codes: codes.into_boxed_slice(),
            absmax: absmax.into_boxed_slice(),
            map: (!same).then(|| Box::new(*map)),
            offset,
        }))
    }

    /// Double-quantizes plain scales, bit for bit as `bitsandbytes` does on the CPU.
    ///
    /// NaN and infinity make every scale NaN; [`Quantized4Bit`] takes neither.
    #[must_use]
    pub fn double_quantize(absmax: &[f32]) -> Self {
        let mut codes = vec![0; absmax.len()].into_boxed_slice();
        let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK)].into_boxed_slice();
        let offset = Kernels::detect()
            .quantize_absmax(absmax, &mut codes, &mut nested)
            .expect("both buffers were just made with the lengths that this needs");
        Self(Storage::Nested { codes, absmax: nested, map: None, offset })
    }

    /// The borrowed view.
    #[must_use]
    pub fn view(&self) -> Absmax<'_> {
        match &self.0 {
            Storage::Plain(absmax) => Absmax::Plain(absmax),
            Storage::Nested { codes, absmax, map, offset } => {
                let map = map.as_deref().unwrap_or(&DYNAMIC_MAP);
                Absmax::Nested(NestedAbsmax::new(codes, map, absmax, *offset).expect("both constructors checked it"))
            }
        }
    }

    /// Whether the scales are double-quantized.
    #[must_use]
    pub fn is_nested(&self) -> bool {
        matches!(self.0, Storage::Nested { .. })
    }

    /// Bytes on the heap: 4 a block; or 1 a block, 4 for each [`NESTED_BLOCK`] blocks, and 1024 for a map of its own.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        match &self.0 {
            Storage::Plain(absmax) => size_of_val(&**absmax),
            Storage::Nested { codes, absmax, map, .. } => {
                size_of_val(&**codes) + size_of_val(&**absmax) + map.as_deref().map_or(0, size_of_val)
            }
        }
    }
}

/// A matrix of NF4 weights `[rows, cols]` that owns its packed codes and scales: the base of a [`crate::QLoRALayer`].
///
/// Every scale is finite, so every weight is. [`Self::view`] gives the [`Nf4Matrix`] that [`Kernels`] work on.
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
#[derive(Debug, Clone)]
pub struct Quantized4Bit {
    packed: Box<[u8]>,
    absmax: AbsmaxBuf,
    rows: usize,
    cols: usize,
    block_size: BlockSize,
}

impl Quantized4Bit {
    /// Quantizes row-major weights `[rows, cols]`, with `double_quant` also their scales; bit for bit as `bitsandbytes`
    /// does on the CPU (block size 64 is its default).
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if there are not `rows * cols` weights; [`Error::NotFinite`] if one is NaN or infinite,
    /// or if finite ones are so large (above `1e30`, say) that their double-quantized scales are not finite.
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
        parallel::quantize(Kernels::detect(), weights, block_size, &mut packed, &mut absmax)?;
        // The absmax of a block is finite if and only if its weights are, and there are fewer to look at.
        if !absmax.iter().all(|a: &f32| a.is_finite()) {
            check_finite("base weight", weights)?;
        }
        let absmax = if double_quant { AbsmaxBuf::double_quantize(&absmax) } else { AbsmaxBuf::plain(absmax) };
        Self::from_parts(packed, absmax, rows, cols, block_size)
    }

    /// Joins packed codes (two a byte, the first in the high half) and scales that come from a file or from elsewhere.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths do not fit `[rows, cols]` and `block_size`, see [`Nf4Matrix::new`];
    /// [`Error::NotFinite`] with the index of the block if a scale is NaN or infinite.
    pub fn from_parts(
        packed: Vec<u8>,
        absmax: AbsmaxBuf,
        rows: usize,
        cols: usize,
        block_size: BlockSize,
    ) -> Result<Self, Error> {
        let view = absmax.view();
        Nf4Matrix::new(&packed, view, rows, cols, block_size)?;
        for index in 0..view.len() {
            let value = view.get(index);
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "absmax", index, value });
            }
        }
        Ok(Self { packed: packed.into_boxed_slice(), absmax, rows, cols, block_size })
    }

    /// The borrowed view, for [`Kernels`].
    #[must_use]
    pub fn view(&self) -> Nf4Matrix<'_> {
        Nf4Matrix::new(&self.packed, self.absmax.view(), self.rows, self.cols, self.block_size)
            .expect("the constructor checked it")
    }

    /// The weights, row-major `[rows, cols]`, rounded once to `T`: `CODEBOOK[code] * absmax`.
    ///
    /// # Panics
    /// If the result does not fit in memory; [`Self::dequantize_rows`] restores it in parts.
    #[must_use]
    pub fn dequantize<T: Float>(&self) -> Vec<T> {
        let mut out = vec![T::from_f32(0.0); self.rows * self.cols];
        parallel::dequantize(Kernels::detect(), &self.view(), &mut out)
            .expect("`out` was just made with the right length");
        out
    }

    /// The weights of some rows, row-major, in `out`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no such rows or `out` does not have `rows.len() * self.cols()` elements.
    pub fn dequantize_rows<T: Float>(&self, rows: core::ops::Range<usize>, out: &mut [T]) -> Result<(), Error> {
        Ok(parallel::dequantize(Kernels::detect(), &self.view().row_range(rows)?, out)?)
    }
}

/// What it is.
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

    /// Weights in a block.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Whether the scales are double-quantized.
    #[must_use]
    pub fn is_double_quantized(&self) -> bool {
        self.absmax.is_nested()
    }

    /// The packed codes, two a byte, the first in the high half.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales of the blocks.
    #[must_use]
    pub fn absmax(&self) -> &AbsmaxBuf {
        &self.absmax
    }

    /// Bytes on the heap: packed codes and scales. There is no spare capacity and no second copy.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.packed.len() + self.absmax.memory_bytes()
    }

    /// Bits of [`Self::memory_bytes`] for each weight; NaN if there are no weights.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.memory_bytes() as f64 * 8.0 / self.len() as f64
    }
}
