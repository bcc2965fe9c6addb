//! The gradients of an adapter and of the input, through the weight below it.
//!
//! With upstream gradients `dy` `[batch, d_out]` of the outputs for inputs `x` `[batch, d_in]`:
//!
//! ```text
//! dA = scale * B^T dy^T x        dB = scale * dy^T (x A^T)        dx = dy W + scale * (dy B) A
//! ```
//!
//! With `DoRA` and the gains `g` of the rows, `dy` stands for `g dy` in these, and the magnitude gets
//! `dm = sum over the batch of dy * (W x + scale * B (A x)) / norm`, from the f32 product; the norm counts as a
//! constant.

use alloc::vec::Vec;

use nf4_kernels::Float;

use crate::adapter::joined::{Fresh, Joined};
use crate::buffer::{grow, take};
use crate::error::{Error, check_batch, check_len};
use crate::tensor::Tensor;
use crate::weight::base::Base;
use crate::weight::row_sums::add_rows;

/// Working memory for [`crate::QLoRALayer::backward_into`]; any number of steps and layers can use it in turn.
///
/// A batch of `n` vectors on a layer `[d_out, d_in]` of rank `r` needs `2 * n * r + max(d_out, d_in)` f32. A backward reads
/// nothing that an earlier one left behind.
#[derive(Debug, Clone, Default)]
pub struct BackwardScratch {
    values: Vec<f32>,
}

impl BackwardScratch {
    /// An empty scratch, to be grown by [`Self::reserve`]. [`crate::QLoRALayer::backward_scratch`] makes one for a layer.
    #[must_use]
    pub const fn new() -> Self {
        Self { values: Vec::new() }
    }

    /// Grows the scratch, if necessary, for batches of `batch` vectors on a layer `[d_out, d_in]` of this rank.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn reserve(&mut self, d_out: usize, d_in: usize, rank: usize, batch: usize) -> Result<(), Error> {
        grow(&mut self.values, low_rank_len(rank, batch).saturating_add(d_out.max(d_in)))
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<f32>()
    }

    /// Two low-rank products of a batch, and a row of inputs or a column of outputs.
    fn parts(&mut self, base: &Base<'_>, rank: usize, batch: usize) -> Result<(&mut [f32], &mut [f32]), Error> {
        let (low_rank, row) = (low_rank_len(rank, batch), base.d_out().max(base.d_in()));
        let values = take("scratch for the backward", &mut self.values, low_rank.saturating_add(row))?;
        Ok(values.split_at_mut(low_rank))
    }
}

fn low_rank_len(rank: usize, batch: usize) -> usize {
    batch.saturating_mul(rank).saturating_mul(2)
}

impl Joined {
    /// The number of vectors in `x` `[batch, d_in]` and `dy` `[batch, d_out]`, if all lengths fit.
    pub(crate) fn check_gradients(&self, base: &Base<'_>, x: &[f32], dy: &[f32]) -> Result<usize, Error> {
        self.pair(base)?;
        let (d_out, d_in) = (base.d_out(), base.d_in());
        let batch = if d_in == 0 { dy.len().checked_div(d_out).unwrap_or(0) } else { check_batch(x.len(), d_in)? };
        check_len("input", batch.saturating_mul(d_in), x.len())?;
        check_len("output gradient", batch.saturating_mul(d_out), dy.len())?;
        Ok(batch)
    }

    /// [`crate::QLoRALayer::try_backward`], on any base.
    pub(crate) fn try_backward(&mut self, base: &Base<'_>, x: &[f32], dy: &[f32]) -> Result<Tensor, Error> {
        let batch = self.check_gradients(base, x, dy)?;
        let (mut scratch, mut dx) = (BackwardScratch::new(), Tensor::try_zeros(1, x.len())?);
        scratch.reserve(base.d_out(), base.d_in(), self.adapter().rank(), batch)?;
        self.backward(base, x, dy, &mut scratch, Some(dx.data_mut()))?;
        Ok(dx)
    }

    /// [`crate::QLoRALayer::backward_into`], on any base.
    pub(crate) fn backward(
        &mut self,
        base: &Base<'_>,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        mut dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let batch = self.check_gradients(base, x, dy)?;
        let (d_out, d_in, rank) = (base.d_out(), base.d_in(), self.adapter().rank());
        if let Some(dx) = &dx {
            check_len("input gradient", x.len(), dx.len())?;
        }
        let (low_rank, buffer) = scratch.parts(base, rank, batch)?;
        if d_in == 0 || d_out == 0 {
            dx.into_iter().for_each(|dx| dx.fill(0.0));
            return Ok(());
        }
        self.refresh_with(base, &mut buffer[..d_in])?;
        self.gradients_mut().make_gradients()?;
        let column = &mut buffer[..d_out];
        let fresh = self.fresh(base)?;
        if let Some(dx) = &mut dx {
            let gained = gained(dy, d_out, fresh.gains);
            for (n, dx) in dx.chunks_exact_mut(d_in).enumerate() {
                column.iter_mut().enumerate().for_each(|(row, value)| *value = gained(n, row));
                base.transposed(column, dx)?;
            }
        }
        let (u, v) = low_rank.split_at_mut(batch * rank);
        low_rank_products(base, fresh, x, dy, u, v)?;
        if let Some(dx) = dx {
            for (v, dx) in v.chunks_exact(rank).zip(dx.chunks_exact_mut(d_in)) {
                add_rows(dx, |k| v[k], fresh.pair.a);
            }
        }
        self.add_gradients(base, x, dy, u, v, column)
    }

    /// Adds to the gradients of `A`, `B` and the magnitude, where these are trained.
    fn add_gradients(
        &mut self,
        base: &Base<'_>,
        x: &[f32],
        dy: &[f32],
        u: &[f32],
        v: &[f32],
        column: &mut [f32],
    ) -> Result<(), Error> {
        let (d_out, d_in) = (base.d_out(), base.d_in());
        let (adapter, norms, gains) = self.parts_mut();
        let (rank, gained) = (adapter.rank(), gained(dy, d_out, gains));
        if let Some(grad) = adapter.b_mut().grad_mut()? {
            for (row, grad) in grad.chunks_exact_mut(rank).enumerate() {
                add_rows(grad, |n| gained(n, row), u);
            }
        }
        if let Some(grad) = adapter.a_mut().grad_mut()? {
            for (k, grad) in grad.chunks_exact_mut(d_in).enumerate() {
                add_rows(grad, |n| v[n * rank + k], x);
            }
        }
        if !adapter.magnitude().is_some_and(Tensor::requires_grad) {
            return Ok(());
        }
        // dm = sum over the batch of dy * (V x) / |V|.
        for ((x, u), dy) in x.chunks_exact(d_in).zip(u.chunks_exact(rank)).zip(dy.chunks_exact(d_out)) {
            base.product_f32(x, column)?;
            base.kernels().gemv_dense_add(adapter.b().data(), u, 1.0, column)?;
            let grad = adapter.magnitude_mut().map(Tensor::grad_mut).transpose()?.flatten();
            for (((grad, y), dy), norm) in grad.into_iter().flatten().zip(&*column).zip(dy).zip(norms) {
                if *norm != 0.0 {
                    *grad = f32::from_f32(*grad + dy * y / norm);
                }
            }
        }
        Ok(())
    }
}

/// `u = scale * x A^T` and `v = scale * dy B`, each `[batch, rank]`.
fn low_rank_products(
    base: &Base<'_>,
    Fresh { pair, gains }: Fresh<'_>,
    x: &[f32],
    dy: &[f32],
    u: &mut [f32],
    v: &mut [f32],
) -> Result<(), Error> {
    for (x, u) in x.chunks_exact(base.d_in()).zip(u.chunks_exact_mut(pair.rank)) {
        base.kernels().gemv_dense(pair.a, x, u)?;
    }
    v.fill(0.0);
    let gained = gained(dy, base.d_out(), gains);
    for (n, v) in v.chunks_exact_mut(pair.rank).enumerate() {
        add_rows(v, |row| gained(n, row), pair.b);
    }
    u.iter_mut().chain(v).for_each(|value| *value *= pair.scale);
    Ok(())
}

/// The upstream gradient of the product `V x` for vector `n` and row `row`, which with `DoRA` includes the gain.
fn gained<'a>(dy: &'a [f32], d_out: usize, gains: Option<&'a [f32]>) -> impl Fn(usize, usize) -> f32 + use<'a> {
    move |n, row| {
        let dy = dy[n * d_out + row];
        gains.map_or(dy, |gains| gains[row] * dy)
    }
}
