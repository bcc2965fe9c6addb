//! Gradients of an adapter, and through the weight below it.

use alloc::vec::Vec;

use nf4_kernels::{Float, ShapeError};

use crate::adapter::lora::LoRAAdapter;
use crate::buffer::grow;
use crate::error::{Error, check_batch, check_len, or_panic};
use crate::layer::qlora::QLoRALayer;
use crate::tensor::Tensor;
use crate::weight::base::Base;
use crate::weight::dense::add_rows;

/// Working memory of [`QLoRALayer::backward_into`], made once and used for any number of steps and layers.
///
/// A batch of `n` on a layer `[d_out, d_in]` of rank `r` needs `2 * n * r + max(d_out, d_in)` f32. A backward leaves
/// nothing in it that the next one reads.
#[derive(Debug, Clone, Default)]
pub struct BackwardScratch {
    values: Vec<f32>,
}

impl BackwardScratch {
    /// Scratch that is too small for any layer yet; see [`Self::reserve`] and [`QLoRALayer::backward_scratch`].
    #[must_use]
    pub const fn new() -> Self {
        Self { values: Vec::new() }
    }

    /// Grows, if need be, so that batches of `batch` vectors on a layer with these numbers fit as well as what did
    /// before.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[track_caller]
    pub fn reserve(&mut self, d_out: usize, d_in: usize, rank: usize, batch: usize) {
        or_panic(self.try_reserve(d_out, d_in, rank, batch));
    }

    /// As [`Self::reserve`].
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit in memory.
    pub fn try_reserve(&mut self, d_out: usize, d_in: usize, rank: usize, batch: usize) -> Result<(), Error> {
        let len = Self::low_rank_len(rank, batch).saturating_add(d_out.max(d_in));
        Ok(grow(&mut self.values, len)?)
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<f32>()
    }

    /// Two low-rank products of a batch, and a row of inputs or a column of outputs.
    fn parts(
        &mut self,
        d_out: usize,
        d_in: usize,
        rank: usize,
        batch: usize,
    ) -> Result<(&mut [f32], &mut [f32]), Error> {
        let (low_rank, row) = (Self::low_rank_len(rank, batch), d_out.max(d_in));
        let (expected, got) = (low_rank.saturating_add(row), self.values.len());
        let values = self.values.get_mut(..expected);
        let values = values.ok_or(ShapeError::Length { what: "scratch for the backward", expected, got })?;
        Ok(values.split_at_mut(low_rank))
    }

    fn low_rank_len(rank: usize, batch: usize) -> usize {
        batch.saturating_mul(rank).saturating_mul(2)
    }
}

/// Training.
///
/// With upstream gradients `dy` `[batch, d_out]` of the outputs for inputs `x` `[batch, d_in]`:
///
/// ```text
/// dA = scale * B^T dy^T x        dB = scale * dy^T (x A^T)        dx = dy W + scale * (dy B) A
/// ```
///
/// With `DoRA` and the gains `g` of the rows, `dy` stands for `g dy` in these, and the magnitude gets
/// `dm = sum over the batch of dy * (W x + scale * B (A x)) / norm`, from the f32 product; the norm counts as a
/// constant.
///
/// All of it is f32, every operation rounded on its own in a fixed order, so that the bits are the same on each
/// machine and with each choice of kernels. `dy W` comes from the packed bytes
/// ([`nf4_kernels::Kernels::gemv_transposed_f32`]); no weight is ever dequantized for it. These are the gradients of
/// the f32 forward; the 16x4 forward differs from that only by its rounding.
///
/// The base weight and the bias are frozen, as in `QLoRA`, and get no gradient. There is no dropout: what a training
/// loop wants of it, it does to `x` itself.
impl QLoRALayer {
    /// Adds the gradients of `A`, `B` and, with `DoRA`, the magnitude to those of the tensors ([`Tensor::grad`]) and
    /// returns that of the input, `[batch, d_in]`. `x` is one vector or a batch of them, `[batch, d_in]`, and `dy`
    /// `[batch, d_out]`.
    ///
    /// Gradients accumulate over calls until [`Self::zero_grad`]. A NaN or infinity gives what IEEE 754 says; every
    /// NaN is [`f32::NAN`]. The optimizers of this crate refuse such gradients. Stale norms of `DoRA` are taken again.
    ///
    /// # Panics
    /// Where [`Self::try_backward`] gives an error.
    #[track_caller]
    pub fn backward(&mut self, x: &Tensor, dy: &Tensor) -> Tensor {
        or_panic(self.try_backward(x, dy))
    }

    /// As [`Self::backward`].
    ///
    /// # Errors
    /// [`Error::Batch`] if `x` does not hold whole vectors of `d_in` values; [`Error::Shape`] if `dy` does not have
    /// `d_out` values for each of them; [`Error::MatrixLength`] if `A` or `B` was replaced by a tensor of another
    /// length. No gradient was changed then.
    pub fn try_backward(&mut self, x: &Tensor, dy: &Tensor) -> Result<Tensor, Error> {
        let batch = self.adapter.check_gradients(x.data(), dy.data())?;
        let (mut scratch, mut dx) = (BackwardScratch::new(), Tensor::try_zeros(1, x.len())?);
        scratch.try_reserve(self.d_out(), self.d_in(), self.rank(), batch)?;
        self.backward_into(x.data(), dy.data(), &mut scratch, Some(dx.data_mut()))?;
        Ok(dx)
    }

    /// As [`Self::backward`], with the gradient of the input in a buffer of the caller, and without allocation once
    /// `A` and `B` have gradients (with the feature `rayon`, large products with `W^T` do). Without `dx`, for the first
    /// layer of a model, the packed weights are only read for the magnitude of `DoRA`.
    ///
    /// # Errors
    /// As [`Self::try_backward`]; [`Error::Shape`] also if `dx` does not have as many values as `x`, or if `scratch`
    /// is too small. No gradient was changed then.
    pub fn backward_into(
        &mut self,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.adapter.backward(self.linear.base(), x, dy, scratch, dx)
    }

    /// Working memory for [`Self::backward_into`] of up to `batch` vectors.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[must_use]
    #[track_caller]
    pub fn backward_scratch(&self, batch: usize) -> BackwardScratch {
        let mut scratch = BackwardScratch::new();
        scratch.reserve(self.d_out(), self.d_in(), self.rank(), batch);
        scratch
    }

    /// Sets the gradients of everything that is trained to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.zero_grad();
    }
}

impl LoRAAdapter {
    /// The number of vectors in `x` `[batch, d_in]` and `dy` `[batch, d_out]`, if all lengths fit.
    pub(crate) fn check_gradients(&self, x: &[f32], dy: &[f32]) -> Result<usize, Error> {
        self.check()?;
        let (d_out, d_in) = (self.d_out(), self.d_in());
        let batch = if d_in == 0 { dy.len().checked_div(d_out).unwrap_or(0) } else { check_batch(x.len(), d_in)? };
        check_len("input", batch * d_in, x.len())?;
        check_len("output gradient", batch.saturating_mul(d_out), dy.len())?;
        Ok(batch)
    }

    /// [`QLoRALayer::backward_into`], on any weight.
    pub(crate) fn backward(
        &mut self,
        base: Base<'_>,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        mut dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let batch = self.check_gradients(x, dy)?;
        let (d_out, d_in, rank, scale) = (self.d_out(), self.d_in(), self.rank(), self.scale());
        if let Some(dx) = &dx {
            check_len("input gradient", x.len(), dx.len())?;
        }
        let (low_rank, buffer) = scratch.parts(d_out, d_in, rank, batch)?;
        if d_in == 0 || d_out == 0 {
            dx.into_iter().for_each(|dx| dx.fill(0.0));
            return Ok(());
        }
        self.refresh(base, &mut buffer[..d_in])?;
        let column = &mut buffer[..d_out];

        // With DoRA the product V x of row r is multiplied by the gain g[r], so it sees g[r] dy[r].
        let Self { a, b, dora, .. } = self;
        let gains = dora.as_ref().map(|dora| &*dora.gains);
        let gained = |n: usize, row: usize| {
            let dy = dy[n * d_out + row];
            gains.map_or(dy, |gains| gains[row] * dy)
        };
        if let Some(dx) = &mut dx {
            for (n, dx) in dx.chunks_exact_mut(d_in).enumerate() {
                column.iter_mut().enumerate().for_each(|(row, value)| *value = gained(n, row));
                base.transposed(column, dx)?;
            }
        }

        // u = scale * x A^T and v = scale * dy B.
        let (u, v) = low_rank.split_at_mut(batch * rank);
        for (x, u) in x.chunks_exact(d_in).zip(u.chunks_exact_mut(rank)) {
            base.kernels().gemv_dense(a.data(), x, u)?;
        }
        v.fill(0.0);
        for (n, v) in v.chunks_exact_mut(rank).enumerate() {
            add_rows(v, |row| gained(n, row), b.data());
        }
        u.iter_mut().chain(&mut *v).for_each(|value| *value *= scale);

        if let Some(grad) = b.grad_mut() {
            for (row, grad) in grad.chunks_exact_mut(rank).enumerate() {
                add_rows(grad, |n| gained(n, row), u);
            }
        }
        if let Some(grad) = a.grad_mut() {
            for (k, grad) in grad.chunks_exact_mut(d_in).enumerate() {
                add_rows(grad, |n| v[n * rank + k], x);
            }
        }
        if let Some(dx) = dx {
            for (v, dx) in v.chunks_exact(rank).zip(dx.chunks_exact_mut(d_in)) {
                add_rows(dx, |k| v[k], a.data());
            }
        }

        // dm = sum over the batch of dy * (V x) / |V|.
        if let Some(dora) = dora
            && let Some(grad) = dora.magnitude.as_mut().and_then(Tensor::grad_mut)
        {
            for ((x, u), dy) in x.chunks_exact(d_in).zip(u.chunks_exact(rank)).zip(dy.chunks_exact(d_out)) {
                base.product(x, column)?;
                base.kernels().gemv_dense_add(b.data(), u, 1.0, column)?;
                for (((grad, y), dy), norm) in grad.iter_mut().zip(&*column).zip(dy).zip(&dora.norms) {
                    if *norm != 0.0 {
                        *grad = f32::from_f32(*grad + dy * y / norm);
                    }
                }
            }
        }
        Ok(())
    }
}
