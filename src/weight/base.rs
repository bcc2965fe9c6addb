//! The frozen weight below an adapter, packed or dense: what training needs of it.

use nf4_kernels::{Kernels, Nf4Matrix};

use crate::error::Error;
use crate::parallel;
use crate::weight::dense::add_rows;

/// A weight `[d_out, d_in]`, neither of them 0 where it is multiplied, and the kernels to multiply it with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Base<'a> {
    Packed(Nf4Matrix<'a>, Kernels),
    /// Row-major.
    Dense(&'a [f32], Kernels),
}

impl Base<'_> {
    /// `y = W x` in f32.
    pub(crate) fn product(self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        match self {
            Self::Packed(weight, kernels) => Ok(parallel::gemm_f32(kernels, &weight, x, y)?),
            Self::Dense(weight, kernels) => Ok(kernels.gemv_dense(weight, x, y)?),
        }
    }

    /// `dx = W^T dy` in f32.
    pub(crate) fn transposed(self, dy: &[f32], dx: &mut [f32]) -> Result<(), Error> {
        match self {
            Self::Packed(weight, kernels) => parallel::gemv_transposed_f32(kernels, &weight, dy, dx)?,
            Self::Dense(weight, _) => {
                dx.fill(0.0);
                add_rows(dx, |row| dy[row], weight);
            }
        }
        Ok(())
    }

    /// Row `row`, exactly.
    pub(crate) fn row(self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        match self {
            Self::Packed(weight, kernels) => kernels.dequantize(&weight.row_range(row..row + 1)?, out)?,
            Self::Dense(weight, _) => out.copy_from_slice(&weight[row * out.len()..][..out.len()]),
        }
        Ok(())
    }

    pub(crate) fn kernels(self) -> Kernels {
        let (Self::Packed(_, kernels) | Self::Dense(_, kernels)) = self;
        kernels
    }
}
