//! Gradients of a [`QLoRALayer`].

use alloc::vec::Vec;

use nf4_kernels::{Kernels, ShapeError};

use crate::adapter::LoRAAdapter;
use crate::dense::add_rows;
use crate::error::{Error, check_batch, check_len, or_panic};
use crate::qlora::QLoRALayer;
use crate::tensor::Tensor;

/// Working memory of [`QLoRALayer::backward_into`], made once and used for any number of steps and layers.
///
/// A batch of `n` on a layer of rank `r` needs `2 * n * r` f32. A backward leaves nothing in it that the next one
/// reads.
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

    /// Grows, if need be, so that batches of `batch` vectors on `layer` fit as well as what did before.
    pub fn reserve(&mut self, layer: &QLoRALayer, batch: usize) {
        let len = Self::len(layer.rank(), batch);
        if self.values.len() < len {
            self.values.reserve_exact(len - self.values.len());
            self.values.resize(len, 0.0);
        }
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<f32>()
    }

    fn len(rank: usize, batch: usize) -> usize {
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
/// All of it is f32, every operation rounded on its own in a fixed order, so that the bits are the same on each
/// machine and with each choice of [`Kernels`]. `dy W` comes from the packed bytes
/// ([`Kernels::gemv_transposed_f32`]); no weight is ever dequantized for it. These are the gradients of the f32
/// forward; the 16x4 forward differs from that only by its rounding.
///
/// The base weight and the bias are frozen, as in `QLoRA`, and get no gradient. There is no dropout: what a training
/// loop wants of it, it does to `x` itself.
impl QLoRALayer {
    /// Adds the gradients of `A` and `B` to those of the tensors ([`Tensor::grad`]) and returns that of the input,
    /// `[batch, d_in]`. `x` is one vector or a batch of them, `[batch, d_in]`, and `dy` `[batch, d_out]`.
    ///
    /// Gradients accumulate over calls until [`Self::zero_grad`]. A NaN or infinity gives what IEEE 754 says; every
    /// NaN is [`f32::NAN`]. The optimizers of this crate refuse such gradients.
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
        let batch = self.check_batch(x.data(), dy.data())?;
        let (mut scratch, mut dx) = (self.backward_scratch(batch), Tensor::zeros(x.len(), false));
        self.backward_into(x.data(), dy.data(), &mut scratch, Some(dx.data_mut()))?;
        Ok(dx)
    }

    /// As [`Self::backward`], with the gradient of the input in a buffer of the caller, and without allocation once
    /// `A` and `B` have gradients. Without `dx`, for the first layer of a model, the packed weights are not read at
    /// all.
    ///
    /// # Errors
    /// As [`Self::try_backward`]; [`Error::Shape`] also if `dx` does not have as many values as `x`, or if `scratch`
    /// is too small. No gradient was changed then.
    pub fn backward_into(
        &mut self,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        mut dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let batch = self.check_batch(x, dy)?;
        self.adapter.check()?;
        let (d_out, d_in) = (self.d_out(), self.d_in());
        if let Some(dx) = &dx {
            check_len("input gradient", x.len(), dx.len())?;
        }
        let (expected, got) = (BackwardScratch::len(self.rank(), batch), scratch.values.len());
        let too_small = ShapeError::Length { what: "scratch for the backward", expected, got };
        let low_rank = scratch.values.get_mut(..expected).ok_or(too_small)?;
        if d_in == 0 || d_out == 0 {
            if let Some(dx) = dx {
                dx.fill(0.0);
            }
            return Ok(());
        }

        let kernels = self.linear.kernels;
        if let Some(dx) = &mut dx {
            let view = self.linear.weight.view();
            for (dy, dx) in dy.chunks_exact(d_out).zip(dx.chunks_exact_mut(d_in)) {
                kernels.gemv_transposed_f32(&view, dy, dx)?;
            }
        }
        self.adapter.add_gradients(kernels, x, dy, low_rank, dx)
    }

    /// Working memory for [`Self::backward_into`] of up to `batch` vectors.
    #[must_use]
    pub fn backward_scratch(&self, batch: usize) -> BackwardScratch {
        let mut scratch = BackwardScratch::new();
        scratch.reserve(self, batch);
        scratch
    }

    /// Sets the gradients of everything that is trained to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.zero_grad();
    }

    /// The number of vectors in `x` `[batch, d_in]` and `dy` `[batch, d_out]`.
    fn check_batch(&self, x: &[f32], dy: &[f32]) -> Result<usize, Error> {
        let (d_out, d_in) = (self.d_out(), self.d_in());
        let batch = if d_in == 0 { dy.len().checked_div(d_out).unwrap_or(0) } else { check_batch(x.len(), d_in)? };
        check_len("input", batch * d_in, x.len())?;
        check_len("output gradient", batch.saturating_mul(d_out), dy.len())?;
        Ok(batch)
    }
}

impl LoRAAdapter {
    /// Adds the gradients of `A` and `B` for the inputs `x` `[batch, d_in]` to those of the tensors, and `scale * (dy
    /// B) A` to `dx`. `low_rank` is scratch, `[2, batch, rank]`; neither `d_in` nor `d_out` is 0.
    fn add_gradients(
        &mut self,
        kernels: Kernels,
        x: &[f32],
        dy: &[f32],
        low_rank: &mut [f32],
        dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let (d_out, d_in, rank, scale) = (self.d_out(), self.d_in(), self.rank(), self.scale());
        let (a, b) = self.a_and_b_mut();
        // u = scale * x A^T and v = scale * dy B.
        let (u, v) = low_rank.split_at_mut(low_rank.len() / 2);
        for (x, u) in x.chunks_exact(d_in).zip(u.chunks_exact_mut(rank)) {
            kernels.gemv_dense(a.data(), x, u)?;
        }
        v.fill(0.0);
        for (dy, v) in dy.chunks_exact(d_out).zip(v.chunks_exact_mut(rank)) {
            add_rows(v, |row| dy[row], b.data());
        }
        u.iter_mut().chain(&mut *v).for_each(|value| *value *= scale);

        if let Some(grad) = b.grad_mut() {
            for (row, grad) in grad.chunks_exact_mut(rank).enumerate() {
                add_rows(grad, |n| dy[n * d_out + row], u);
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
        Ok(())
    }
}
