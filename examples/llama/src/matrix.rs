//! Dense matrices: the embedding, the head, and linear layers that a checkpoint did not quantize.

use alloc::string::ToString;
use alloc::vec::Vec;
use core::ops::Range;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use nf4::checkpoint::{FloatType, TensorSource};
use nf4::{BlockSize, Float, Kernels, Quantized4Bit, SharedBytes, bf16, f16};

use crate::error::Error;
use crate::threads::Pool;
use crate::weights::{check_shape, float_type};

/// Rows that are converted to f32 at a time.
const TILE: usize = 32;

/// A row-major matrix `[rows, cols]` in the type of the checkpoint, on the checkpoint's bytes where their address
/// allows it.
#[derive(Debug)]
pub(crate) struct Matrix {
    values: Values,
    rows: usize,
    cols: usize,
}

#[derive(Debug)]
enum Values {
    F32(Words<u32>),
    F16(Words<u16>),
    Bf16(Words<u16>),
}

/// The bits of floats.
enum Words<T> {
    Owned(Vec<T>),
    /// Aligned, little endian as this machine, and of the right length.
    Shared(SharedBytes, Range<usize>),
}

impl<T: bytemuck::Pod> Words<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::Owned(words) => words,
            Self::Shared(owner, range) => {
                let bytes = (**owner).as_ref().get(range.clone()).unwrap_or_default();
                bytemuck::try_cast_slice(bytes).unwrap_or_default()
            }
        }
    }
}

impl<T> core::fmt::Debug for Words<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Owned(words) => write!(f, "Owned({})", words.len()),
            Self::Shared(_, range) => write!(f, "Shared({range:?})"),
        }
    }
}

impl Matrix {
    pub(crate) fn load(source: &dyn TensorSource, name: &str, [rows, cols]: [usize; 2]) -> Result<Self, Error> {
        check_shape(source, name, &[rows, cols])?;
        let values = match float_type(source, name)? {
            FloatType::F32 => Values::F32(words(source, name, rows * cols, u32::from_le_bytes)?),
            FloatType::F16 => Values::F16(words(source, name, rows * cols, u16::from_le_bytes)?),
            FloatType::BF16 => Values::Bf16(words(source, name, rows * cols, u16::from_le_bytes)?),
        };
        let matrix = Self { values, rows, cols };
        match matrix.first_not_finite() {
            None => Ok(matrix),
            Some((index, value)) => {
                let error = nf4::Error::NotFinite { what: "matrix", index, value };
                Err(Error::Layer { module: name.to_string(), error })
            }
        }
    }

    /// `[rows, cols]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Bytes of the values, wherever they are.
    pub(crate) fn data_bytes(&self) -> usize {
        let size = if matches!(self.values, Values::F32(_)) { 4 } else { 2 };
        self.rows * self.cols * size
    }

    /// Row `row` as f32; exact.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        self.convert(row * self.cols..(row + 1) * self.cols, out);
    }

    /// Quantized in blocks of 64 with plain scales, as `nf4 quantize` does by itself.
    pub(crate) fn quantize(&self) -> Result<Quantized4Bit, nf4::Error> {
        let (rows, cols, block_size) = (self.rows, self.cols, BlockSize::B64);
        match &self.values {
            Values::F32(words) => {
                Quantized4Bit::quantize(bytemuck::cast_slice::<_, f32>(words.as_slice()), rows, cols, block_size, false)
            }
            Values::F16(words) => {
                let values: &[f16] = words.as_slice().reinterpret_cast();
                Quantized4Bit::quantize(values, rows, cols, block_size, false)
            }
            Values::Bf16(words) => {
                let values: &[bf16] = words.as_slice().reinterpret_cast();
                Quantized4Bit::quantize(values, rows, cols, block_size, false)
            }
        }
    }

    /// Values of the buffer that [`Self::product`] needs for each thread.
    pub(crate) fn tile_len(&self) -> usize {
        if matches!(self.values, Values::F32(_)) { 0 } else { TILE.min(self.rows) * self.cols }
    }

    /// `y` `[batch, rows]` of `x` `[batch, cols]`: the dense f32 product on the exact f32 values of the matrix.
    pub(crate) fn product(
        &self,
        kernels: Kernels,
        pool: &Pool,
        x: &[f32],
        tile: &mut [f32],
        y: &mut [f32],
    ) -> Result<(), nf4::Error> {
        let each = self.tile_len();
        // The rows of one vector, or whole vectors.
        if x.len() == self.cols {
            pool.by_rows((y, 1), (tile, each), &|first, y, tile| self.product_rows(kernels, first, x, tile, y))
        } else {
            pool.by_rows((y, self.rows), (tile, each), &|first, y, tile| {
                let count = y.len() / self.rows;
                self.product_rows(kernels, 0, &x[first * self.cols..][..count * self.cols], tile, y)
            })
        }
    }

    /// `y` `[batch, rows]` for the rows from `start` on, as many as `y` has for each vector.
    fn product_rows(
        &self,
        kernels: Kernels,
        start: usize,
        x: &[f32],
        tile: &mut [f32],
        y: &mut [f32],
    ) -> Result<(), nf4::Error> {
        let cols = self.cols;
        let rows = y.len() / (x.len() / cols).max(1);
        for first in (0..rows).step_by(TILE) {
            let count = TILE.min(rows - first);
            let range = (start + first) * cols..(start + first + count) * cols;
            let values = if let Values::F32(words) = &self.values {
                bytemuck::cast_slice(words.as_slice()).get(range).unwrap_or_default()
            } else {
                let tile = &mut tile[..count * cols];
                self.convert(range, tile);
                &*tile
            };
            for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(rows)) {
                kernels.gemv_dense(values, x, &mut y[first..first + count])?;
            }
        }
        Ok(())
    }

    /// Values as f32; exact.
    fn convert(&self, range: Range<usize>, out: &mut [f32]) {
        match &self.values {
            Values::F32(words) => {
                let values: &[f32] = bytemuck::cast_slice(words.as_slice());
                out.copy_from_slice(&values[range]);
            }
            Values::F16(words) => {
                let values: &[f16] = words.as_slice()[range].reinterpret_cast();
                values.convert_to_f32_slice(out);
            }
            Values::Bf16(words) => {
                out.iter_mut()
                    .zip(&words.as_slice()[range])
                    .for_each(|(out, w)| *out = f32::from_bits(u32::from(*w) << 16));
            }
        }
    }

    fn first_not_finite(&self) -> Option<(usize, f32)> {
        let exponent_16 = |words: &Words<u16>, mask: u16| words.as_slice().iter().position(|w| w & mask == mask);
        let (index, value) = match &self.values {
            Values::F32(words) => {
                let index = words.as_slice().iter().position(|w| w & 0x7f80_0000 == 0x7f80_0000)?;
                (index, f32::from_bits(words.as_slice()[index]))
            }
            Values::F16(words) => {
                let index = exponent_16(words, 0x7c00)?;
                (index, Float::to_f32(f16::from_bits(words.as_slice()[index])))
            }
            Values::Bf16(words) => {
                let index = exponent_16(words, 0x7f80)?;
                (index, Float::to_f32(bf16::from_bits(words.as_slice()[index])))
            }
        };
        Some((index, value))
    }
}

/// The words of a tensor: where they are, or a copy.
fn words<T: bytemuck::Pod, const N: usize>(
    source: &dyn TensorSource,
    name: &str,
    len: usize,
    from_le_bytes: fn([u8; N]) -> T,
) -> Result<Words<T>, Error> {
    if let Some((owner, range)) = source.shared(name)
        && cfg!(target_endian = "little")
    {
        let words = Words::Shared(owner, range);
        if words.as_slice().len() == len {
            return Ok(words);
        }
    }
    let bytes = source.read(name)?;
    Ok(Words::Owned(bytes.as_chunks().0.iter().map(|bytes| from_le_bytes(*bytes)).collect()))
}
