//! The frozen weight below an adapter, packed or dense: its products and its rows.

use nf4_kernels::{Float, Kernels, Nf4Matrix};

use crate::error::Error;
use crate::parallel::Executor;
use crate::weight::gradients::GradientsBuf;
use crate::weight::inputs::{Arithmetic, Inputs, InputsBuf};

/// A weight `[d_out, d_in]`, and how to multiply by it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Base<'a> {
    weight: Weight<'a>,
    d_out: usize,
    d_in: usize,
    executor: &'a Executor,
}

#[derive(Debug, Clone, Copy)]
enum Weight<'a> {
    Packed(Nf4Matrix<'a>, Arithmetic),
    /// Row-major.
    Dense(&'a [f32]),
}

impl<'a> Base<'a> {
    pub(crate) fn packed(weight: Nf4Matrix<'a>, arithmetic: Arithmetic, executor: &'a Executor) -> Self {
        Self { d_out: weight.rows(), d_in: weight.cols(), weight: Weight::Packed(weight, arithmetic), executor }
    }

    /// `weight` has `d_out * d_in` values.
    pub(crate) fn dense(weight: &'a [f32], d_out: usize, d_in: usize, executor: &'a Executor) -> Self {
        Self { weight: Weight::Dense(weight), d_out, d_in, executor }
    }

    pub(crate) fn d_out(&self) -> usize {
        self.d_out
    }

    pub(crate) fn d_in(&self) -> usize {
        self.d_in
    }

    pub(crate) fn executor(&self) -> &'a Executor {
        self.executor
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.executor.kernels
    }

    /// Prepares inputs `[batch, d_in]` for [`Self::product`], and in f32 for adapters if there are any.
    pub(crate) fn prepare<'b, X: Float>(
        &self,
        x: &'b [X],
        batch: usize,
        adapters: bool,
        buffers: &'b mut InputsBuf,
    ) -> Result<Inputs<'b, X>, Error> {
        match &self.weight {
            Weight::Packed(weight, arithmetic) => {
                buffers.prepare(x, [batch, self.d_in], weight.block_size(), *arithmetic, self.kernels(), adapters)
            }
            Weight::Dense(_) => buffers.convert(x, [batch, self.d_in]),
        }
    }

    /// Grows buffers, if necessary, for inputs `[batch, d_in]`.
    pub(crate) fn reserve(&self, batch: usize, buffers: &mut InputsBuf) -> Result<(), Error> {
        match &self.weight {
            Weight::Packed(weight, _) => buffers.reserve(self.d_in, weight.block_size(), batch),
            Weight::Dense(_) => buffers.reserve_floats(self.d_in, batch),
        }
    }

    /// `y = W x` for a batch, in the arithmetic of the layer; `y` is `[d_out, batch]`.
    pub(crate) fn product<X: Float>(&self, x: &Inputs<'_, X>, y: &mut [f32]) -> Result<(), Error> {
        match &self.weight {
            _ if self.d_in == 0 => y.fill(0.0),
            Weight::Packed(weight, Arithmetic::SixteenByFour) => self.executor.gemm(weight, x.activations()?, y)?,
            Weight::Packed(weight, Arithmetic::EightByEight) => {
                self.executor.gemm_8x8(weight, x.activations_8x8()?, y)?;
            }
            Weight::Packed(weight, Arithmetic::F32) => self.executor.gemm_f32(weight, x.all(), y)?,
            Weight::Dense(weight) => self.executor.gemm_dense(weight, x.all(), [x.batch(), self.d_in], y)?,
        }
        Ok(())
    }

    /// `y = W x` for a batch, in f32 whatever the arithmetic of the layer; `y` is `[d_out, batch]`.
    pub(crate) fn product_f32(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        match &self.weight {
            Weight::Packed(weight, _) => Ok(self.executor.gemm_f32(weight, x, y)?),
            Weight::Dense(weight) => {
                Ok(self.executor.gemm_dense(weight, x, [x.len() / self.d_in.max(1), self.d_in], y)?)
            }
        }
    }

    /// `dx = W^T dy` for a batch: `dy` is `[batch, d_out]`, `dx` `[batch, d_in]`, neither of them empty. It is computed in f32
    /// if the arithmetic of the layer is, and else with integers, for which `quantized` has room.
    pub(crate) fn transposed(&self, dy: &[f32], quantized: &mut GradientsBuf, dx: &mut [f32]) -> Result<(), Error> {
        match &self.weight {
            Weight::Packed(weight, Arithmetic::F32) => self.executor.gemm_transposed_f32(weight, dy, dx)?,
            Weight::Packed(weight, Arithmetic::SixteenByFour | Arithmetic::EightByEight) => {
                let buffers = quantized.take(self.d_out, dy.len() / self.d_out)?;
                self.executor.gemm_transposed(weight, dy, buffers, dx)?;
            }
            Weight::Dense(weight) => {
                dx.fill(0.0);
                self.executor.gemm_transposed_dense_add(weight, dy, dy.len() / self.d_out, dx)?;
            }
        }
        Ok(())
    }

    /// The weights of row `row`, exactly.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        match &self.weight {
            Weight::Packed(weight, _) => self.kernels().dequantize(&weight.row_range(row..row + 1)?, out)?,
            Weight::Dense(weight) => out.copy_from_slice(&weight[row * self.d_in..][..self.d_in]),
        }
        Ok(())
    }
}
