//! The operations, each of which checks its arguments and then calls the function of an instruction set.

#![expect(unsafe_code, reason = "calls functions of instruction sets that this CPU was found to have")]

mod products_8x8;

use core::fmt;

use crate::activations::Activations;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::format::{BlockSize, NESTED_BLOCK, packed_len};
use crate::isa::{Isa, PORTABLE, TABLES, Table};
use crate::matrix::Nf4Matrix;

/// The operations, implemented for one instruction set: to quantize, to dequantize, and to multiply by packed weights.
///
/// A value proves that this CPU has the instruction set. Results have the same bits on every instruction set; see
/// [`crate::spec`] for the products and for what NaN and infinity do. Operations work in buffers that the caller provides.
/// A value is one pointer, so copies are cheap.
///
/// ```
/// use nf4_kernels::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix};
/// let kernels = Kernels::detect();
/// let (rows, cols, block) = (3, 128, BlockSize::B64);
/// let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
/// let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.3).cos()).collect();
///
/// let (mut packed, mut absmax) = (vec![0; rows * cols / 2], vec![0.0; block.blocks(rows * cols)]);
/// kernels.quantize(&weights, block, &mut packed, &mut absmax)?;
/// let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, block)?;
///
/// let mut values = vec![0; Activations::values_len(cols, block)];
/// let mut scales = vec![0.0; Activations::scales_len(cols, block)];
/// let activations = kernels.quantize_activations(&x, block, &mut values, &mut scales)?;
/// let mut y = [0.0; 3];
/// kernels.gemv(&matrix, &activations, &mut y)?;
/// # let mut z = [0.0; 3];
/// # kernels.gemv_f32(&matrix, &x, &mut z)?;
/// # assert!(y.iter().zip(z).all(|(y, z)| (y - z).abs() < 1e-2), "{y:?} {z:?}");
/// # Ok::<(), nf4_kernels::ShapeError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Kernels {
    table: &'static Table,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa()).finish()
    }
}

impl PartialEq for Kernels {
    fn eq(&self, other: &Self) -> bool {
        self.isa() == other.isa()
    }
}

impl Eq for Kernels {}

impl Default for Kernels {
    fn default() -> Self {
        Self::detect()
    }
}

/// Selection.
impl Kernels {
    /// The fastest kernels that this CPU supports. Detection runs once, and does not need `std`.
    #[must_use]
    pub fn detect() -> Self {
        match TABLES[0] {
            (_, Some(_)) => Self::available().next().unwrap_or(Self::scalar()),
            // The target decides, and this is a constant, so that firmware links only the operations that it calls.
            (table, None) => Self { table },
        }
    }

    /// The portable kernels.
    #[must_use]
    pub const fn scalar() -> Self {
        Self { table: PORTABLE.0 }
    }

    /// The kernels of every instruction set that this CPU supports, the fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        TABLES.iter().filter(|(_, supported)| supported.is_none_or(|f| f())).map(|&(table, _)| Self { table })
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.table.isa
    }
}

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
    /// [`crate::DYNAMIC_MAP`]. The mean is summed in the order of `PyTorch` on one thread.
    ///
    /// NaN or infinity makes the offset NaN or infinite; then every code is 0 and every nested absmax is NaN. The mean of no
    /// values is NaN.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `codes` or `nested_absmax` has the wrong length.
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

    /// Quantizes a vector for [`Self::gemv`], in buffers that the caller provides.
    ///
    /// `values` and `scales` must have the lengths [`Activations::values_len`] and [`Activations::scales_len`]. The result
    /// can be multiplied by matrices of every block size with the same group ([`BlockSize::group`]). The scale of a group
    /// that contains NaN or infinity is NaN, which makes every output NaN.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if a buffer has the wrong length.
    pub fn quantize_activations<'a>(
        &self,
        inputs: &'a [f32],
        block_size: BlockSize,
        values: &'a mut [i16],
        scales: &'a mut [f32],
    ) -> Result<Activations<'a>, ShapeError> {
        self.quantize_activations_batch(inputs, inputs.len(), block_size, values, scales)
    }

    /// Quantizes a batch of vectors, `inputs` `[batch, cols]`, for [`Self::gemm`], each of them like
    /// [`Self::quantize_activations`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `cols`, or if `values` or `scales` does not
    /// have `batch` times the length that one vector needs.
    pub fn quantize_activations_batch<'a>(
        &self,
        inputs: &'a [f32],
        cols: usize,
        block_size: BlockSize,
        values: &'a mut [i16],
        scales: &'a mut [f32],
    ) -> Result<Activations<'a>, ShapeError> {
        let slots = self.table.slots;
        Activations::new(inputs, cols, block_size, values, scales, slots)?;
        let (values_len, scales_len) =
            (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
        // If one of them is 0, all are. Saying so lets the compiler drop the panics of `chunks`.
        if cols > 0 && values_len > 0 && scales_len > 0 {
            let vectors = inputs.chunks(cols).zip(values.chunks_mut(values_len)).zip(scales.chunks_mut(scales_len));
            for ((inputs, values), scales) in vectors {
                // SAFETY: `self` exists, so the CPU has the instruction set of its table.
                unsafe { (self.table.quantize_activations)(inputs, block_size.group(), values, scales) };
            }
        }
        Activations::new(inputs, cols, block_size, values, scales, slots)
    }
}

/// Products.
impl Kernels {
    /// Computes the 16x4 product `out = W x`, which [`crate::spec`] defines to the bit, with an error bound.
    ///
    /// Matrices whose blocks straddle rows ([`Nf4Matrix::is_row_aligned`]) are multiplied like in [`Self::gemv_f32`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `activations` is not one vector of `cols` inputs or `out` does not have `rows` elements;
    /// [`ShapeError::Group`] if the activations were quantized for another group; [`ShapeError::Order`] if they were
    /// quantized by the kernels of another instruction set.
    pub fn gemv(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("activations", matrix.cols(), activations.cols())?;
        if matrix.cols() > 0 {
            check_len("vectors of the batch", 1, activations.batch())?;
        }
        if !matrix.is_row_aligned() {
            return self.gemv_f32(matrix, activations.inputs(), out);
        }
        check_len("outputs", matrix.rows(), out.len())?;
        activations.check_group(matrix.block_size())?;
        activations.check_order(self.table.slots)?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (self.table.gemv)(matrix, activations, out) };
        Ok(())
    }

    /// Computes the 16x4 product of a matrix and a batch of vectors. Every output has the bits that [`Self::gemv`] returns
    /// for its row and vector, whatever the batch.
    ///
    /// `out` is `[rows, batch]`, so that the outputs of a row of the matrix are adjacent, and can be split like the matrix.
    /// A tile takes up to 100 KB of stack.
    ///
    /// ```
    /// use nf4_kernels::{Absmax, Activations, BlockSize, Kernels, Nf4Matrix};
    /// let (kernels, rows, cols, batch, block) = (Kernels::detect(), 2, 64, 3, BlockSize::B64);
    /// let (packed, absmax) = ([0xff; 64], [1.0, 2.0]); // all weights are 1 in the first row, 2 in the second
    /// let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, block)?;
    ///
    /// let x = [[0.5; 64], [1.0; 64], [-1.0; 64]];
    /// let mut values = vec![0; batch * Activations::values_len(cols, block)];
    /// let mut scales = vec![0.0; batch * Activations::scales_len(cols, block)];
    /// let x = kernels.quantize_activations_batch(x.as_flattened(), cols, block, &mut values, &mut scales)?;
    /// let mut out = [0.0; 6];
    /// kernels.gemm(&matrix, &x, &mut out)?;
    /// let expected = [32.0, 64.0, -64.0, 64.0, 128.0, -128.0]; // [rows, batch]
    /// assert!(out.iter().zip(expected).all(|(y, e)| (y - e).abs() < 0.1), "{out:?}");
    /// # Ok::<(), nf4_kernels::ShapeError>(())
    /// ```
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the activations do not have `cols` inputs or `out` does not have `rows * batch` elements;
    /// [`ShapeError::Group`] if the activations were quantized for another group; [`ShapeError::Order`] if they were
    /// quantized by the kernels of another instruction set.
    pub fn gemm(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("activations", matrix.cols(), activations.cols())?;
        if !matrix.is_row_aligned() {
            return self.gemm_f32(matrix, activations.inputs(), out);
        }
        check_batch_outputs(matrix, activations.batch(), out)?;
        activations.check_group(matrix.block_size())?;
        activations.check_order(self.table.slots)?;
        match activations.batch() {
            0 => {}
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            1 => unsafe { (self.table.gemv)(matrix, activations, out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            _ => unsafe { (self.table.gemm)(matrix, activations, out) },
        }
        Ok(())
    }

    /// Computes the f32 product `out = W x`, which [`crate::spec`] defines. It does not depend on how the rows are split.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `cols` elements or `out` does not have `rows` elements.
    pub fn gemv_f32(&self, matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        check_len("inputs", matrix.cols(), inputs.len())?;
        check_len("outputs", matrix.rows(), out.len())?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (self.table.gemv_f32)(matrix, inputs, out) };
        Ok(())
    }

    /// Computes the f32 product of a matrix and a batch of vectors, `inputs` `[batch, cols]`; `out` is `[rows, batch]`. Every
    /// output has the bits that [`Self::gemv_f32`] returns for its row and vector.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `cols` or `out` does not have `rows * batch`
    /// elements.
    pub fn gemm_f32(&self, matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        let batch = inputs.len().checked_div(matrix.cols()).unwrap_or(0);
        check_len("inputs", batch * matrix.cols(), inputs.len())?;
        check_batch_outputs(matrix, batch, out)?;
        match batch {
            0 => {}
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            1 => unsafe { (self.table.gemv_f32)(matrix, inputs, out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            _ => unsafe { (self.table.gemm_f32)(matrix, inputs, out) },
        }
        Ok(())
    }

    /// Computes the f32 product with the transposed matrix, `out = W^T x`, for gradients; [`crate::spec`] defines it.
    /// `inputs` has one element per row of the matrix, `out` one per column.
    ///
    /// Rows are summed in chunks of [`crate::spec::ROW_CHUNK`]. So if a matrix is split at multiples of it, the results of
    /// the parts, summed in order, have the same bits.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `rows` elements or `out` does not have `cols` elements.
    pub fn gemv_transposed_f32(
        &self,
        matrix: &Nf4Matrix<'_>,
        inputs: &[f32],
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("inputs", matrix.rows(), inputs.len())?;
        check_len("outputs", matrix.cols(), out.len())?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (self.table.gemv_transposed_f32)(matrix, inputs, out) };
        Ok(())
    }

    /// Computes the f32 product of the transposed matrix and a batch of vectors, `inputs` `[batch, rows]`; `out` is
    /// `[batch, cols]`. So gradients of outputs give gradients of inputs. Every vector of `out` has the bits that
    /// [`Self::gemv_transposed_f32`] returns for its inputs, whatever the batch. A tile takes about 40 KB of stack.
    ///
    /// If the matrix has no rows, `out` may have any number of vectors, and becomes zeros.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `rows` or `out` does not have `batch * cols`
    /// elements; [`ShapeError::Overflow`] if that number does not fit in `usize`.
    pub fn gemm_transposed_f32(
        &self,
        matrix: &Nf4Matrix<'_>,
        inputs: &[f32],
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let batch = inputs.len().checked_div(rows).or(out.len().checked_div(cols)).unwrap_or(0);
        check_len("inputs", batch * rows, inputs.len())?;
        check_len("outputs", batch.checked_mul(cols).ok_or(ShapeError::Overflow { rows: batch, cols })?, out.len())?;
        match (batch, out.is_empty() || inputs.is_empty()) {
            (_, true) => out.fill(0.0),
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            (1, false) => unsafe { (self.table.gemv_transposed_f32)(matrix, inputs, out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            (_, false) => unsafe { (self.table.gemm_transposed_f32)(matrix, inputs, out) },
        }
        Ok(())
    }

    /// Computes `out += A^T x` with a dense f32 matrix `[rows, cols]`, row-major, and a batch of vectors, `x`
    /// `[batch, rows]`; `out` is `[batch, cols]`. Gradients of adapters consist of such products; [`crate::spec`] defines
    /// them.
    ///
    /// `rows` is the length of `x` divided by `batch`, and `cols` is the length of `out` divided by `batch`.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `x` or `out` is not a multiple of `batch`, or if `a` does not have
    /// `rows * cols` elements; [`ShapeError::Overflow`] if that number does not fit in `usize`.
    pub fn gemm_transposed_dense_add(
        &self,
        a: &[f32],
        x: &[f32],
        batch: usize,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let (rows, cols) = (x.len().checked_div(batch).unwrap_or(0), out.len().checked_div(batch).unwrap_or(0));
        check_len("inputs", rows * batch, x.len())?;
        check_len("outputs", cols * batch, out.len())?;
        // Without vectors, the shape of the matrix is not known.
        if batch > 0 {
            check_dense(rows, cols, a)?;
        }
        if !a.is_empty() && batch > 0 {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemm_transposed_dense_add)(a, x, batch, out) };
        }
        Ok(())
    }

    /// Computes `out = A x` with a dense matrix `[out.len(), x.len()]`, row-major, of any element type; [`crate::spec`]
    /// defines it. The elements are converted to f32 as they are read.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `a` does not have `out.len() * x.len()` elements; [`ShapeError::Overflow`] if that number
    /// does not fit in `usize`.
    pub fn gemv_dense<T: Float>(&self, a: &[T], x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        self.dense(a, x, None, out)
    }

    /// Computes `out += factor * (A x)` with a dense matrix, like [`Self::gemv_dense`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `a` does not have `out.len() * x.len()` elements; [`ShapeError::Overflow`] if that number
    /// does not fit in `usize`.
    pub fn gemv_dense_add<T: Float>(&self, a: &[T], x: &[f32], factor: f32, out: &mut [f32]) -> Result<(), ShapeError> {
        self.dense(a, x, Some(factor), out)
    }

    /// Computes the product of a dense matrix `[rows, cols]`, row-major, and a batch of vectors, `x` `[batch, cols]`; `out` is
    /// `[rows, batch]`. Every output has the bits that [`Self::gemv_dense`] returns for its row and vector.
    ///
    /// `cols` is the length of `x` divided by `batch`, and `rows` is the length of `out` divided by `batch`.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `x` or `out` is not a multiple of `batch`, or if `a` does not have
    /// `rows * cols` elements; [`ShapeError::Overflow`] if that number does not fit in `usize`.
    pub fn gemm_dense<T: Float>(&self, a: &[T], x: &[f32], batch: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if batch == 1 {
            return self.gemv_dense(a, x, out);
        }
        let (rows, cols) = (out.len().checked_div(batch).unwrap_or(0), x.len().checked_div(batch).unwrap_or(0));
        check_len("inputs", cols * batch, x.len())?;
        check_len("outputs", rows * batch, out.len())?;
        // Without vectors, the shape of the matrix is not known.
        if batch > 0 {
            check_dense(rows, cols, a)?;
        }
        if x.is_empty() {
            out.fill(0.0);
        } else {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (T::pick(self.table).gemm_dense)(a, x, batch, out) };
        }
        Ok(())
    }

    fn dense<T: Float>(&self, a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32]) -> Result<(), ShapeError> {
        check_dense(out.len(), x.len(), a)?;
        if x.is_empty() {
            out.iter_mut().for_each(|o| crate::isa::store_dense(o, 0.0, add));
        } else {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (T::pick(self.table).gemv_dense)(a, x, add, out) };
        }
        Ok(())
    }
}

/// `Ok` if a dense matrix has `rows * cols` elements.
fn check_dense<T>(rows: usize, cols: usize, a: &[T]) -> Result<(), ShapeError> {
    let elements = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
    check_len("dense matrix", elements, a.len())
}

/// `Ok` if `out` has `rows * batch` elements.
fn check_batch_outputs(matrix: &Nf4Matrix<'_>, batch: usize, out: &[f32]) -> Result<(), ShapeError> {
    let (rows, cols) = (matrix.rows(), batch);
    check_len("outputs", rows.checked_mul(batch).ok_or(ShapeError::Overflow { rows, cols })?, out.len())
}
