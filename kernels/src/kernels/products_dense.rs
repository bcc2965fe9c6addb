//! The products of dense matrices.

use super::Kernels;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::isa::FEW_COLUMNS;

/// The products of dense matrices, such as adapters.
impl Kernels {
    /// The columns up to which [`Self::gemm_dense_add`] is fast.
    pub const FEW_COLUMNS: usize = FEW_COLUMNS;

    /// Computes `out = A x` with a dense matrix `[out.len(), x.len()]`, row-major, of any element type; [`spec`](crate::spec)
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
        check_batch([out.len(), x.len()], ["outputs", "inputs"], batch, a)?;
        if x.is_empty() {
            out.fill(0.0);
        } else {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (T::pick(self.table).gemm_dense)(a, x, batch, out) };
        }
        Ok(())
    }

    /// Computes `out += factor * (A x)` with a dense f32 matrix `[rows, cols]`, row-major, and a batch of vectors that stand
    /// side by side: `x` is `[cols, batch]`, as [`Self::gemm_dense`] returns it, and `out` `[rows, batch]`. Every output has
    /// the bits that [`Self::gemv_dense_add`] returns for its row and vector. It is made for few columns, such as the rank of
    /// an adapter; above [`Self::FEW_COLUMNS`] portable code runs.
    ///
    /// `cols` is the length of `x` divided by `batch`, and `rows` is the length of `out` divided by `batch`.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `x` or `out` is not a multiple of `batch`, or if `a` does not have
    /// `rows * cols` elements; [`ShapeError::Overflow`] if that number does not fit in `usize`.
    pub fn gemm_dense_add(
        &self,
        a: &[f32],
        x: &[f32],
        batch: usize,
        factor: f32,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_batch([out.len(), x.len()], ["outputs", "inputs"], batch, a)?;
        if x.is_empty() {
            out.iter_mut().for_each(|o| crate::isa::store_dense(o, 0.0, Some(factor)));
        } else if !out.is_empty() {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemm_dense_add)(a, x, batch, factor, out) };
        }
        Ok(())
    }

    /// Computes `out += A^T x` with a dense f32 matrix `[rows, cols]`, row-major, and a batch of vectors, `x`
    /// `[batch, rows]`; `out` is `[batch, cols]`. Gradients of adapters consist of such products; [`spec`](crate::spec) defines
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
        check_batch([x.len(), out.len()], ["inputs", "outputs"], batch, a)?;
        if !a.is_empty() && batch > 0 {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemm_transposed_dense_add)(a, x, batch, out) };
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

/// `Ok` if two lengths, whose names are for errors, are those of `batch` vectors, and a dense matrix has as many rows as a
/// vector of the first has values, and as many columns as one of the second.
fn check_batch<T>(lengths: [usize; 2], names: [&'static str; 2], batch: usize, a: &[T]) -> Result<(), ShapeError> {
    let [rows, cols] = lengths.map(|length| length.checked_div(batch).unwrap_or(0));
    check_len(names[0], rows * batch, lengths[0])?;
    check_len(names[1], cols * batch, lengths[1])?;
    // Without vectors, the shape of the matrix is not known.
    if batch > 0 { check_dense(rows, cols, a) } else { Ok(()) }
}

/// `Ok` if a dense matrix has `rows * cols` elements.
fn check_dense<T>(rows: usize, cols: usize, a: &[T]) -> Result<(), ShapeError> {
    let elements = rows.checked_mul(cols).ok_or(ShapeError::Overflow { rows, cols })?;
    check_len("dense matrix", elements, a.len())
}
