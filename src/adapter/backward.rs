//! The gradients of an adapter and of the input, through the weight below it.
//!
//! With upstream gradients `dy` `[batch, d_out]` of the outputs for inputs `x` `[batch, d_in]`:
//!
//! ```text
//! u = scale * x A^T              v = scale * dy B
//! dA = v^T x                     dB = dy^T u                      dx = dy W + v A
//! ```
//!
//! With `DoRA` and the gains `g` of the rows, `g dy` stands for `dy` in `v` and `dx`, `dB` is `g (dy^T u)`, and the
//! magnitude gets `dm = sum over the batch of dy * (W x + B u) / norm`, from the f32 product; the norm counts as a constant.
//!
//! All but `u` and `dm` are transposed products of a batch, for `dA` and `dB` of `rank` vectors, and share their order of
//! additions.

use alloc::vec::Vec;

use nf4_kernels::Float;

use crate::adapter::joined::{Fresh, Joined};
use crate::adapter::lora::LoRAAdapter;
use crate::buffer::{grow, take};
use crate::error::{Error, check_batch, check_len};
use crate::tensor::Tensor;
use crate::weight::base::Base;
use crate::weight::gradients::GradientsBuf;

/// Working memory for [`QLoRALayer::backward_into`]; any number of steps and layers can use it in turn.
///
/// A batch of `n` vectors on a layer `[d_out, d_in]` of rank `r` needs `3 * n * r + max(d_out * max(r, min(n, 64) + 1),
/// d_in)` f32, and `n * d_out` i16 with an f32 for each 32. A backward reads nothing that an earlier one left behind.
///
/// [`QLoRALayer::backward_into`]: crate::QLoRALayer::backward_into
#[derive(Debug, Clone, Default)]
pub struct BackwardScratch {
    values: Vec<f32>,
    gradients: GradientsBuf,
}

impl BackwardScratch {
    /// An empty scratch, to be grown by [`Self::reserve`]. [`QLoRALayer::backward_scratch`] makes one for a layer.
    ///
    /// [`QLoRALayer::backward_scratch`]: crate::QLoRALayer::backward_scratch
    #[must_use]
    pub const fn new() -> Self {
        Self { values: Vec::new(), gradients: GradientsBuf::new() }
    }

    /// Grows the scratch, if necessary, for batches of `batch` vectors on a layer `[d_out, d_in]` of this rank.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn reserve(&mut self, d_out: usize, d_in: usize, rank: usize, batch: usize) -> Result<(), Error> {
        grow(&mut self.values, low_rank_len(rank, batch).saturating_add(buffer_len(d_out, d_in, rank, batch)))?;
        self.gradients.reserve(d_out, batch)
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<f32>() + self.gradients.memory_bytes()
    }

    /// Room for quantized gradients.
    pub(crate) fn gradients(&mut self) -> &mut GradientsBuf {
        &mut self.gradients
    }

    /// Three low-rank matrices of a batch, and a buffer for what is larger.
    fn parts(
        &mut self,
        base: &Base<'_>,
        rank: usize,
        batch: usize,
    ) -> Result<(LowRank<'_>, &mut [f32], &mut GradientsBuf), Error> {
        let (low_rank, buffer) = (low_rank_len(rank, batch), buffer_len(base.d_out(), base.d_in(), rank, batch));
        let values = take("scratch for the backward", &mut self.values, low_rank.saturating_add(buffer))?;
        let (low_rank, buffer) = values.split_at_mut(low_rank);
        let (u, rest) = low_rank.split_at_mut(batch * rank);
        let (v, transposed) = rest.split_at_mut(batch * rank);
        Ok((LowRank { u, v, transposed }, buffer, &mut self.gradients))
    }
}

/// Low-rank matrices of a batch.
struct LowRank<'a> {
    /// `scale * A x^T`, `[rank, batch]`.
    u: &'a mut [f32],
    /// `scale * dy B`, `[batch, rank]`.
    v: &'a mut [f32],
    /// One of them, transposed.
    transposed: &'a mut [f32],
}

fn low_rank_len(rank: usize, batch: usize) -> usize {
    batch.saturating_mul(rank).saturating_mul(3)
}

/// The gradient of `B`, transposed; upstream gradients or outputs of a tile, and a vector of outputs; a row of the base.
fn buffer_len(d_out: usize, d_in: usize, rank: usize, batch: usize) -> usize {
    d_out.saturating_mul(rank.max(batch.min(TILE) + 1)).max(d_in)
}

/// Vectors that `DoRA` takes at a time.
const TILE: usize = 64;

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

    /// [`QLoRALayer::try_backward`](crate::QLoRALayer::try_backward), on any base.
    pub(crate) fn try_backward(&mut self, base: &Base<'_>, x: &[f32], dy: &[f32]) -> Result<Tensor, Error> {
        let batch = self.check_gradients(base, x, dy)?;
        let (mut scratch, mut dx) = (BackwardScratch::new(), Tensor::try_zeros(1, x.len())?);
        scratch.reserve(base.d_out(), base.d_in(), self.adapter().rank(), batch)?;
        self.backward(base, x, dy, &mut scratch, Some(dx.data_mut()))?;
        Ok(dx)
    }

    /// [`QLoRALayer::backward_into`](crate::QLoRALayer::backward_into), on any base.
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
        let (mut low_rank, buffer, gradients) = scratch.parts(base, rank, batch)?;
        if d_in == 0 || d_out == 0 {
            dx.into_iter().for_each(|dx| dx.fill(0.0));
            return Ok(());
        }
        self.refresh_with(base, &mut buffer[..d_in])?;
        self.gradients_mut().make_gradients()?;
        let Fresh { pair, gains } = self.fresh(base)?;
        base.executor().gemm_dense(pair.a, x, [batch, d_in], low_rank.u)?;
        low_rank.u.iter_mut().for_each(|u| *u *= pair.scale);
        low_rank.v.fill(0.0);
        // Without gains nothing has to be copied, and all vectors are one tile.
        let tile = if gains.is_some() { TILE } else { batch.max(1) };
        for (i, (dy, v)) in dy.chunks(tile * d_out).zip(low_rank.v.chunks_mut(tile * rank)).enumerate() {
            let (dy, n) = (gained(dy, gains, buffer), dy.len() / d_out);
            base.executor().gemm_transposed_dense_add(pair.b, dy, n, v)?;
            v.iter_mut().for_each(|v| *v *= pair.scale);
            if let Some(dx) = &mut dx {
                let dx = &mut dx[i * tile * d_in..][..n * d_in];
                base.transposed(dy, gradients, dx)?;
                base.executor().gemm_transposed_dense_add(pair.a, v, n, dx)?;
            }
        }
        self.add_gradients(base, x, dy, &mut low_rank, buffer)
    }

    /// Adds to the gradients of `A`, `B` and the magnitude, where these are trained.
    fn add_gradients(
        &mut self,
        base: &Base<'_>,
        x: &[f32],
        dy: &[f32],
        low_rank: &mut LowRank<'_>,
        buffer: &mut [f32],
    ) -> Result<(), Error> {
        let d_out = base.d_out();
        let (adapter, norms, gains) = self.parts_mut();
        let rank = adapter.rank();
        if let Some(grad) = adapter.a_mut().grad_mut()? {
            transpose(low_rank.v, rank, low_rank.transposed);
            base.executor().gemm_transposed_dense_add(x, low_rank.transposed, rank, grad)?;
        }
        if let Some(grad) = adapter.b_mut().grad_mut()? {
            let sums = &mut buffer[..d_out * rank];
            match gains {
                None => transpose(grad, rank, sums),
                Some(_) => sums.fill(0.0),
            }
            base.executor().gemm_transposed_dense_add(dy, low_rank.u, rank, sums)?;
            for (k, sums) in sums.chunks_exact(d_out).enumerate() {
                for (row, (grad, sum)) in grad.iter_mut().skip(k).step_by(rank).zip(sums).enumerate() {
                    *grad = gains.map_or(*sum, |gains| f32::from_f32(*grad + gains[row] * sum));
                }
            }
        }
        if !adapter.magnitude().is_some_and(Tensor::requires_grad) {
            return Ok(());
        }
        transpose(low_rank.u, x.len() / base.d_in(), low_rank.transposed);
        let (y, column) = buffer.split_at_mut(buffer.len().min(d_out * TILE.min(x.len() / base.d_in())));
        let tiles =
            x.chunks(TILE * base.d_in()).zip(low_rank.transposed.chunks(TILE * rank)).zip(dy.chunks(TILE * d_out));
        for ((x, u), dy) in tiles {
            add_magnitude_gradient(base, adapter, norms, [x, u, dy], y, &mut column[..d_out])?;
        }
        Ok(())
    }
}

/// Adds to the gradient of the magnitude `dy * (V x) / |V|` of a tile of vectors: `x` `[n, d_in]`, `u` `[n, rank]`, `dy` `[n,
/// d_out]`. `y` and `column` are buffers for `n` vectors of outputs and for one.
fn add_magnitude_gradient(
    base: &Base<'_>,
    adapter: &mut LoRAAdapter,
    norms: &[f32],
    [x, u, dy]: [&[f32]; 3],
    y: &mut [f32],
    column: &mut [f32],
) -> Result<(), Error> {
    let n = x.len() / base.d_in();
    let y = &mut y[..n * base.d_out()];
    base.product_f32(x, y)?;
    for (v, (u, dy)) in u.chunks_exact(adapter.rank()).zip(dy.chunks_exact(base.d_out())).enumerate() {
        column.iter_mut().zip(y.iter().skip(v).step_by(n)).for_each(|(out, y)| *out = *y);
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

/// The upstream gradients of the products `V x` of a tile, `[n, d_out]`, which `DoRA` multiplies by the gains.
fn gained<'a>(dy: &'a [f32], gains: Option<&[f32]>, buffer: &'a mut [f32]) -> &'a [f32] {
    let Some(gains) = gains else { return dy };
    for (dy, out) in dy.chunks_exact(gains.len()).zip(buffer.chunks_exact_mut(gains.len())) {
        for ((out, dy), gain) in out.iter_mut().zip(dy).zip(gains) {
            *out = gain * dy;
        }
    }
    &buffer[..dy.len()]
}

/// A matrix of rows of `cols` values, transposed.
fn transpose(matrix: &[f32], cols: usize, out: &mut [f32]) {
    let rows = matrix.len() / cols.max(1);
    for (r, row) in matrix.chunks_exact(cols.max(1)).enumerate() {
        for (value, out) in row.iter().zip(out.iter_mut().skip(r).step_by(rows)) {
            *out = *value;
        }
    }
}
