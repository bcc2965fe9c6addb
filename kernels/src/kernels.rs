//! The operations: each checks its arguments once, and then calls the function of an instruction set.

#![expect(unsafe_code, reason = "calls functions of instruction sets that this CPU was found to have")]

mod products_8x8;

use core::fmt;

use crate::activations::Activations;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::format::{BlockSize, NESTED_BLOCK, packed_len};
use crate::isa::{Isa, PORTABLE, TABLES, Table};
use crate::matrix::Nf4Matrix;

/// The operations on one instruction set, and the proof that this CPU has it: a value exists only where it was
/// detected.
///
/// All results are the same bits on every instruction set; see [`crate::spec`] for the products and for what NaN and
/// infinity do. All buffers are the caller's. Copies are cheap: a value is one pointer.
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

/// Which kernels to use.
impl Kernels {
    /// The fastest kernels that this CPU supports. The CPU is asked once, then remembered; this does not need `std`.
    #[must_use]
    pub fn detect() -> Self {
        match TABLES[0] {
            (_, Some(_)) => Self::available().next().unwrap_or(Self::scalar()),
            // The target decides, and this is a constant: firmware then links only the operations that it calls.
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
    /// Quantizes a flat tensor as `bitsandbytes` does on the CPU, bit for bit.
    ///
    /// `packed` gets two codes a byte, the first in the high half ([`packed_len`] bytes); an odd last half byte is 7,
    /// the code of zero. `absmax` gets one value a block; the last block may be partial.
    ///
    /// A NaN makes the absmax of its block NaN and all codes 15. An infinity makes it infinite, infinite values of
    /// either sign code 15 and finite ones code 7. A block of zeros has absmax 0 (`1e-38` if partial) and codes 7.
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

    /// Restores the weights, row-major `[rows, cols]`: `CODEBOOK[code] * absmax`, one f32 product, for `f16` and `bf16`
    /// then rounded to nearest even. The same bits as `bitsandbytes`, but that every NaN is the one of
    /// [`Float::from_f32`].
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

    /// Double quantization: codes the absmax of a tensor in 8 bits, with their mean as offset, and returns the offset.
    ///
    /// The mean is summed in the order of `PyTorch` on one thread, so that everything equals `bitsandbytes` bit for
    /// bit. `codes` gets one byte a value, `nested_absmax` one f32 for each [`NESTED_BLOCK`] of them; they are to be
    /// read with [`crate::DYNAMIC_MAP`].
    ///
    /// A NaN or infinity makes the offset NaN or infinite; then every code is 0 and every nested absmax NaN. The mean
    /// of no values is NaN.
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

    /// As [`Self::quantize_absmax`], with an offset that was computed elsewhere.
    ///
    /// A nested block with a NaN or infinity in it gets codes 0 and nested absmax NaN.
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

    /// Quantizes a vector for [`Self::gemv`] in the caller's buffers.
    ///
    /// The lengths of `values` and `scales` are [`Activations::values_len`] and [`Activations::scales_len`]. The result
    /// serves matrices of every block size with the same group ([`BlockSize::group`]). A group with a NaN or infinity
    /// gets the scale NaN: every output is then NaN.
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

    /// Quantizes a batch of vectors, `inputs` `[batch, cols]`, for [`Self::gemm`]: each as
    /// [`Self::quantize_activations`] does.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not hold whole vectors, or if `values` or `scales` does not have `batch`
    /// times the length that one vector needs.
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
        // One of them is 0 only if all are; the compiler needs to hear it to drop the panics of `chunks`.
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
    /// The 16x4 product `out = W x`; see [`crate::spec`] for every bit of it and for its error bound.
    ///
    /// Matrices whose blocks straddle rows ([`Nf4Matrix::is_row_aligned`]) are multiplied as by [`Self::gemv_f32`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `activations` does not have `cols` inputs or `out` not `rows` elements;
    /// [`ShapeError::Group`] if the activations were quantized for another group; [`ShapeError::Order`] if by the
    /// kernels of another instruction set.
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

    /// The 16x4 product of a batch of vectors. Every output has the bits that [`Self::gemv`] gives for its row and
    /// vector, whatever the batch.
    ///
    /// `out` is `[rows, batch]`: the outputs of a row of the matrix stand together, so that it is split as the matrix
    /// is. Up to 100 KB of stack hold what a tile needs.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the activations do not have `cols` inputs or `out` not `rows * batch` elements;
    /// [`ShapeError::Group`] if the activations were quantized for another group; [`ShapeError::Order`] if by the
    /// kernels of another instruction set.
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

    /// The f32 product `out = W x`; see [`crate::spec`]. It does not depend on how the rows are split.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `cols` elements or `out` not `rows`.
    pub fn gemv_f32(&self, matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        check_len("inputs", matrix.cols(), inputs.len())?;
        check_len("outputs", matrix.rows(), out.len())?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (self.table.gemv_f32)(matrix, inputs, out) };
        Ok(())
    }

    /// The f32 product of a batch of vectors, `inputs` `[batch, cols]`, `out` `[rows, batch]` as in [`Self::gemm`].
    /// Every output has the bits that [`Self::gemv_f32`] gives for its row and vector.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not hold whole vectors or `out` does not have `rows * batch` elements.
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

    /// The f32 product with the transposed matrix, `out = W^T x`, for gradients; see [`crate::spec`]. `inputs` has one
    /// element a row, `out` one a column.
    ///
    /// Rows are summed in chunks of [`crate::spec::ROW_CHUNK`], so a sum of the results of views that were cut at
    /// multiples of it, in order, has the same bits.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `rows` elements or `out` not `cols`.
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

    /// The f32 product of a batch with the transposed matrix, `inputs` `[batch, rows]`, `out` `[batch, cols]`: the
    /// gradients of inputs from those of outputs. Every vector of `out` has the bits that [`Self::gemv_transposed_f32`]
    /// gives for its inputs, whatever the batch. About 40 KB of stack hold what a tile needs.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not hold whole vectors or `out` does not have `batch * cols` elements;
    /// [`ShapeError::Overflow`] if that product does not fit in `usize`. Without rows, `out` may hold any number of whole
    /// vectors, and becomes zeros.
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

    /// `out += A^T x` with a dense row-major f32 matrix `[rows, cols]` and a batch of vectors, `x` `[batch, rows]`, `out`
    /// `[batch, cols]`: what the gradients of an adapter consist of; see [`crate::spec`].
    ///
    /// The numbers of rows and columns are those of `x` and `out` divided by `batch`.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `x` or `out` cannot be divided by `batch`, or if `a` does not have `rows * cols`
    /// elements; [`ShapeError::Overflow`] if that product does not fit in `usize`.
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
        // Without vectors nothing says what shape the matrix has.
        if batch > 0 {
            check_dense(rows, cols, a)?;
        }
        if !a.is_empty() && batch > 0 {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemm_transposed_dense_add)(a, x, batch, out) };
        }
        Ok(())
    }

    /// The product `out = A x` with a dense row-major matrix `[out.len(), x.len()]` of any element type, whose elements
    /// are converted to f32 as they are read; see [`crate::spec`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `a` does not have `out.len() * x.len()` elements; [`ShapeError::Overflow`] if that
    /// product does not fit in `usize`.
    pub fn gemv_dense<T: Float>(&self, a: &[T], x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
        self.dense(a, x, None, out)
    }

    /// `out += factor * (A x)` with a dense row-major matrix; the rest as [`Self::gemv_dense`].
    ///
    /// # Errors
    /// As [`Self::gemv_dense`].
    pub fn gemv_dense_add<T: Float>(&self, a: &[T], x: &[f32], factor: f32, out: &mut [f32]) -> Result<(), ShapeError> {
        self.dense(a, x, Some(factor), out)
    }

    /// The product of a dense row-major matrix `[rows, cols]` and a batch of vectors, `x` `[batch, cols]`, `out` `[rows,
    /// batch]` as in [`Self::gemm`]. Every output has the bits that [`Self::gemv_dense`] gives for its row and vector.
    ///
    /// The numbers of columns and rows are those of `x` and `out` divided by `batch`.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `x` or `out` cannot be divided by `batch`, or if `a` does not have `rows * cols`
    /// elements; [`ShapeError::Overflow`] if that product does not fit in `usize`.
    pub fn gemm_dense<T: Float>(&self, a: &[T], x: &[f32], batch: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if batch == 1 {
            return self.gemv_dense(a, x, out);
        }
        let (rows, cols) = (out.len().checked_div(batch).unwrap_or(0), x.len().checked_div(batch).unwrap_or(0));
        check_len("inputs", cols * batch, x.len())?;
        check_len("outputs", rows * batch, out.len())?;
        // Without vectors nothing says what shape the matrix has.
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
