//! The 16x4 products.

use super::{Kernels, check_batch_outputs};
use crate::activations::Activations;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::matrix::Nf4Matrix;

/// The 16x4 products, the precise ones.
impl Kernels {
    /// Computes the 16x4 product `out = W x`, which [`spec`](crate::spec) defines to the bit, with an error bound.
    ///
    /// Matrices whose blocks straddle rows ([`Nf4Matrix::is_row_aligned`]) are multiplied like in [`Self::gemv_f32`].
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `activations` is not one vector of `cols` inputs or `out` does not have `rows` elements;
    /// [`ShapeError::Group`] if the activations were quantized for another group; [`ShapeError::Order`] if they were
    /// quantized by the kernels of another instruction set.
    #[doc(alias("matmul_4bit", "gemv_4bit"))]
    pub fn gemv<T: Float>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_, T>,
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
        unsafe { (self.table.gemv)(matrix, &activations.quantized(), out) };
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
    #[doc(alias = "matmul_4bit")]
    pub fn gemm<T: Float>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_, T>,
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
            1 => unsafe { (self.table.gemv)(matrix, &activations.quantized(), out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            _ => unsafe { (self.table.gemm)(matrix, &activations.quantized(), out) },
        }
        Ok(())
    }
}
