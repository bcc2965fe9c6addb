//! The f32 products of packed weights.

use super::{Kernels, check_batch_outputs};
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::matrix::Nf4Matrix;

/// The f32 products, with a matrix and with its transpose.
impl Kernels {
    /// Computes the f32 product `out = W x`, which [`spec`](crate::spec) defines. It does not depend on how the rows are split.
    /// Inputs in f16 and bf16 are converted to f32 as they are read, which is exact.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `cols` elements or `out` does not have `rows` elements.
    pub fn gemv_f32<T: Float>(&self, matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) -> Result<(), ShapeError> {
        check_len("inputs", matrix.cols(), inputs.len())?;
        check_len("outputs", matrix.rows(), out.len())?;
        // SAFETY: `self` exists, so the CPU has the instruction set of its table.
        unsafe { (T::pick(self.table).gemv_f32)(matrix, inputs, out) };
        Ok(())
    }

    /// Computes the f32 product of a matrix and a batch of vectors, `inputs` `[batch, cols]`; `out` is `[rows, batch]`. Every
    /// output has the bits that [`Self::gemv_f32`] returns for its row and vector.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `cols` or `out` does not have `rows * batch`
    /// elements.
    pub fn gemm_f32<T: Float>(&self, matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) -> Result<(), ShapeError> {
        let batch = inputs.len().checked_div(matrix.cols()).unwrap_or(0);
        check_len("inputs", batch * matrix.cols(), inputs.len())?;
        check_batch_outputs(matrix, batch, out)?;
        match batch {
            0 => {}
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            1 => unsafe { (T::pick(self.table).gemv_f32)(matrix, inputs, out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            _ => unsafe { (T::pick(self.table).gemm_f32)(matrix, inputs, out) },
        }
        Ok(())
    }

    /// Computes the f32 product with the transposed matrix, `out = W^T x`, for gradients; [`spec`](crate::spec) defines it.
    /// `inputs` has one element per row of the matrix, `out` one per column.
    ///
    /// Rows are summed in chunks of [`spec::ROW_CHUNK`]. So if a matrix is split at multiples of it, the results of the
    /// parts, summed in order, have the same bits.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `inputs` does not have `rows` elements or `out` does not have `cols` elements.
    ///
    /// [`spec::ROW_CHUNK`]: crate::spec::ROW_CHUNK
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
}
