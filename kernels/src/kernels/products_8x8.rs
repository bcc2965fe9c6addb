//! The 8x8 products.

use super::{Kernels, check_batch_outputs};
use crate::activations::Activations8x8;
use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::matrix::Nf4Matrix;

/// The 8x8 product, which is the fastest one on CPUs with dot products of 8-bit integers, where 8 bits are precise enough.
/// [`Self::gemv`] is the precise one.
///
/// ```
/// use nf4_kernels::{Absmax, Activations8x8, BlockSize, Kernels, Nf4Matrix};
/// let kernels = Kernels::detect();
/// let (rows, cols, block) = (3, 128, BlockSize::B64);
/// let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
/// let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.3).cos()).collect();
/// let (mut packed, mut absmax) = (vec![0; rows * cols / 2], vec![0.0; block.blocks(rows * cols)]);
/// kernels.quantize(&weights, block, &mut packed, &mut absmax)?;
/// let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), rows, cols, block)?;
///
/// let mut values = vec![0; Activations8x8::values_len(cols)];
/// let mut scales = vec![0.0; Activations8x8::scales_len(cols)];
/// let activations = kernels.quantize_activations_8x8(&x, &mut values, &mut scales)?;
/// let mut y = [0.0; 3];
/// kernels.gemv_8x8(&matrix, &activations, &mut y)?;
/// # let mut z = [0.0; 3];
/// # kernels.gemv_f32(&matrix, &x, &mut z)?;
/// # assert!(y.iter().zip(z).all(|(y, z)| (y - z).abs() < 0.2), "{y:?} {z:?}");
/// # Ok::<(), nf4_kernels::ShapeError>(())
/// ```
impl Kernels {
    /// Computes the 8x8 product `out = W x`, which [`spec`](crate::spec) defines to the bit, with an error bound.
    ///
    /// Matrices whose number of columns is not a multiple of 32 are multiplied like in [`Self::gemv_f32`]. All others are
    /// multiplied at full speed, even if blocks straddle rows.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if `activations` is not one vector of `cols` inputs or `out` does not have `rows` elements;
    /// [`ShapeError::Order`] if the activations were quantized by the kernels of another instruction set.
    pub fn gemv_8x8<T: Float>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations8x8<'_, T>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("activations", matrix.cols(), activations.cols())?;
        if matrix.cols() > 0 {
            check_len("vectors of the batch", 1, activations.batch())?;
        }
        if !matrix.has_whole_groups() {
            return self.gemv_f32(matrix, activations.inputs(), out);
        }
        check_len("outputs", matrix.rows(), out.len())?;
        activations.check_order(self.table.slots_8x8)?;
        if matrix.cols() == 0 {
            out.fill(0.0);
        } else {
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            unsafe { (self.table.gemv_8x8)(matrix, &activations.quantized(), out) };
        }
        Ok(())
    }

    /// Computes the 8x8 product of a matrix and a batch of vectors. Every output has the bits that [`Self::gemv_8x8`] returns
    /// for its row and vector, whatever the batch.
    ///
    /// `out` is `[rows, batch]`, as in [`Self::gemm`]. A tile takes up to 240 KB of stack.
    ///
    /// # Errors
    /// [`ShapeError::Length`] if the activations do not have `cols` inputs or `out` does not have `rows * batch` elements;
    /// [`ShapeError::Order`] if the activations were quantized by the kernels of another instruction set.
    pub fn gemm_8x8<T: Float>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations8x8<'_, T>,
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        check_len("activations", matrix.cols(), activations.cols())?;
        if !matrix.has_whole_groups() {
            return self.gemm_f32(matrix, activations.inputs(), out);
        }
        check_batch_outputs(matrix, activations.batch(), out)?;
        activations.check_order(self.table.slots_8x8)?;
        match activations.batch() {
            0 => {}
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            1 => unsafe { (self.table.gemv_8x8)(matrix, &activations.quantized(), out) },
            // SAFETY: `self` exists, so the CPU has the instruction set of its table.
            _ => unsafe { (self.table.gemm_8x8)(matrix, &activations.quantized(), out) },
        }
        Ok(())
    }
}
