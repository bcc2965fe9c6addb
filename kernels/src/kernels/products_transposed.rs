//! The transposed 16x4 product.

use super::Kernels;
use crate::error::{ShapeError, check_len};
use crate::gradients::Gradients;
use crate::matrix::Nf4Matrix;

/// The transposed 16x4 product, for gradients.
impl Kernels {
    /// Quantizes a batch of vectors, `inputs` `[batch, rows]`, for [`Self::gemm_transposed`], in buffers that the caller
    /// provides.
    ///
    /// `values` and `scales` must have `batch` times the lengths [`Gradients::values_len`] and [`Gradients::scales_len`]. The
    /// scale of a group that contains NaN or infinity is NaN, which makes every output of its vector NaN.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the length of `inputs` is not a multiple of `rows`, or if a buffer has the wrong length.
    pub fn quantize_gradients<'a>(
        &self,
        inputs: &'a [f32],
        rows: usize,
        values: &'a mut [i16],
        scales: &'a mut [f32],
    ) -> Result<Gradients<'a>, ShapeError> {
        Gradients::new(inputs, rows, values, scales)?;
        if !inputs.is_empty() {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.quantize_gradients)(inputs, rows, values, scales) };
        }
        Gradients::new(inputs, rows, values, scales)
    }

    /// Computes the transposed 16x4 product of a matrix and a batch of vectors, which [`spec`](crate::spec) defines to the bit,
    /// with an error bound; `out` is `[batch, cols]`. So gradients of outputs give gradients of inputs. Every vector of `out`
    /// has the same bits in every batch, also alone. A tile takes about 85 KB of stack.
    ///
    /// Matrices whose number of columns is not a multiple of 32 are multiplied like in [`Self::gemm_transposed_f32`]. NaN and
    /// infinity in a vector make all its outputs NaN; a NaN or infinite absmax makes those of its 32 columns NaN.
    ///
    /// Rows are summed in chunks of [`spec::ROW_CHUNK`](crate::spec::ROW_CHUNK). So if a matrix is split at multiples of it,
    /// the results of the parts, summed in order, have the same bits.
    ///
    /// If the matrix has no rows, `out` may have any number of vectors, and becomes zeros.
    ///
    /// ```
    /// use nf4_kernels::{Absmax, BlockSize, Gradients, Kernels, Nf4Matrix};
    /// let (kernels, rows, cols, batch) = (Kernels::detect(), 2, 64, 2);
    /// let (packed, absmax) = ([0xff; 64], [1.0, 2.0]); // all weights are 1 in the first row, 2 in the second
    /// let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, BlockSize::B64)?;
    ///
    /// let dy = [0.5, 0.25, 1.0, -1.0]; // [batch, rows]
    /// let mut values = vec![0; batch * Gradients::values_len(rows)];
    /// let mut scales = vec![0.0; batch * Gradients::scales_len(rows)];
    /// let dy = kernels.quantize_gradients(&dy, rows, &mut values, &mut scales)?;
    /// let mut dx = [0.0; 128];
    /// kernels.gemm_transposed(&matrix, &dy, &mut dx)?;
    /// assert!((dx[0] - 1.0).abs() < 1e-3 && (dx[64] + 1.0).abs() < 1e-3, "{dx:?}"); // [batch, cols]
    /// # Ok::<(), nf4_kernels::ShapeError>(())
    /// ```
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the vectors do not have `rows` inputs or `out` does not have `batch * cols` elements;
    /// [`ShapeError::Overflow`] if that number does not fit in `usize`.
    pub fn gemm_transposed(
        &self,
        matrix: &Nf4Matrix<'_>,
        gradients: &Gradients<'_>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let (rows, cols, batch) = (matrix.rows(), matrix.cols(), gradients.batch());
        check_len("gradients", rows, gradients.rows())?;
        if rows == 0 || !matrix.has_whole_groups() {
            return self.gemm_transposed_f32(matrix, gradients.inputs(), out);
        }
        check_len("outputs", batch.checked_mul(cols).ok_or(ShapeError::Overflow { rows: batch, cols })?, out.len())?;
        if !out.is_empty() {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemm_transposed)(matrix, gradients, out) };
        }
        Ok(())
    }
}
