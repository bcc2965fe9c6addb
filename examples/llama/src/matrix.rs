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

/// Products that are computed at a time before they are stored vector by vector: in the first-level cache.
const TILE_ROWS: usize = 64;
const TILE_VECTORS: usize = 32;
pub(crate) const TILE: usize = TILE_ROWS * TILE_VECTORS;

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

    /// `y` `[batch, rows]` of `x` `[batch, cols]`: the dense product of the kernels, which converts as it reads. `tile` has
    /// [`TILE`] values for each thread.
    pub(crate) fn product(
        &self,
        kernels: Kernels,
        pool: &Pool,
        x: &[f32],
        tile: &mut [f32],
        y: &mut [f32],
    ) -> Result<(), nf4::Error> {
        match &self.values {
            Values::F32(words) => {
                let values: &[f32] = bytemuck::cast_slice(words.as_slice());
                product(kernels, pool, (values, self.rows), x, tile, y)
            }
            Values::F16(words) => {
                let values: &[f16] = words.as_slice().reinterpret_cast();
                product(kernels, pool, (values, self.rows), x, tile, y)
            }
            Values::Bf16(words) => {
                let values: &[bf16] = words.as_slice().reinterpret_cast();
                product(kernels, pool, (values, self.rows), x, tile, y)
            }
        }
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

/// [`Matrix::product`] with a matrix of `rows` rows.
fn product<T: Float>(
    kernels: Kernels,
    pool: &Pool,
    (a, rows): (&[T], usize),
    x: &[f32],
    tile: &mut [f32],
    y: &mut [f32],
) -> Result<(), nf4::Error> {
    let cols = a.len() / rows;
    // The rows of one vector, or whole vectors.
    if x.len() == cols {
        return pool.by_rows((y, 1), (tile, TILE), &|first, y, _| {
            Ok(kernels.gemv_dense(&a[first * cols..][..y.len() * cols], x, y)?)
        });
    }
    pool.by_rows((y, rows), (tile, TILE), &|first, y, tile| {
        let x = &x[first * cols..][..y.len() / rows * cols];
        for (x, y) in x.chunks(TILE_VECTORS * cols).zip(y.chunks_mut(TILE_VECTORS * rows)) {
            let batch = x.len() / cols;
            for (first, a) in (0..).step_by(TILE_ROWS).zip(a.chunks(TILE_ROWS * cols)) {
                let count = a.len() / cols;
                let products = &mut tile[..count * batch];
                kernels.gemm_dense(a, x, batch, products)?;
                for (n, y) in y.chunks_exact_mut(rows).enumerate() {
                    let of_vector = products[n..].iter().step_by(batch);
                    y[first..first + count].iter_mut().zip(of_vector).for_each(|(y, product)| *y = *product);
                }
            }
        }
        Ok(())
    })
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
