//! Training: gradients, and the norms of `DoRA`.

use super::QLoRALayer;
use crate::adapter::backward::BackwardScratch;
use crate::error::{Error, or_panic};
use crate::tensor::Tensor;

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
/// machine and with each choice of kernels and threads. `dy W` comes from the packed bytes
/// ([`nf4_kernels::Kernels::gemv_transposed_f32`]); no weight is ever dequantized for it. These are the gradients of
/// the f32 forward; the 16x4 forward differs from that only by its rounding.
///
/// The base weight and the bias are frozen, as in `QLoRA`, and get no gradient. There is no dropout: a training loop
/// applies it to `x` itself.
impl QLoRALayer {
    /// Adds the gradients of `A`, `B` and, with `DoRA`, the magnitude to those of the tensors ([`Tensor::grad`]) and
    /// returns that of the input, `[batch, d_in]`. `x` is one vector or a batch of them, `[batch, d_in]`, and `dy`
    /// `[batch, d_out]`.
    ///
    /// Gradients accumulate over calls until [`Self::zero_grad`]. A NaN or infinity gives what IEEE 754 says; every
    /// NaN is [`f32::NAN`]. The optimizers of this crate refuse such gradients. Stale norms of `DoRA` are recomputed.
    ///
    /// # Panics
    /// Where [`Self::try_backward`] returns an error.
    #[track_caller]
    pub fn backward(&mut self, x: &Tensor, dy: &Tensor) -> Tensor {
        or_panic(self.try_backward(x, dy))
    }

    /// As [`Self::backward`].
    ///
    /// # Errors
    /// [`Error::Batch`] if `x` does not hold whole vectors of `d_in` values; [`Error::Shape`] if `dy` does not have
    /// `d_out` values for each of them; [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter
    /// or a tensor of it was replaced by one that does not fit; [`Error::OutOfMemory`]. No value of a gradient has
    /// changed then.
    pub fn try_backward(&mut self, x: &Tensor, dy: &Tensor) -> Result<Tensor, Error> {
        self.adapter.try_backward(&self.linear.base()?, x.data(), dy.data())
    }

    /// As [`Self::backward`], with the gradient of the input in a buffer of the caller, and without allocation once
    /// `A` and `B` have gradients (large products with `W^T` on several threads do allocate). Without `dx`, for the
    /// first layer of a model, the packed weights are only read for the magnitude of `DoRA`.
    ///
    /// # Errors
    /// Those that [`Self::try_backward`] lists; [`Error::Shape`] also if `dx` does not have as many values as `x`, or if
    /// `scratch` is too small.
    pub fn backward_into(
        &mut self,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.adapter.backward(&self.linear.base()?, x, dy, scratch, dx)
    }

    /// Working memory for [`Self::backward_into`] of up to `batch` vectors.
    ///
    /// # Panics
    /// If there is no memory for it; [`BackwardScratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn backward_scratch(&self, batch: usize) -> BackwardScratch {
        let mut scratch = BackwardScratch::new();
        or_panic(scratch.reserve(self.d_out(), self.d_in(), self.rank(), batch));
        scratch
    }

    /// Sets the gradients of everything that is trained to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.gradients_mut().zero_grad();
    }

    /// Recomputes the norms of the adapted weight if they are stale; does nothing without `DoRA`. To be called after
    /// [`Self::adapter_mut`] and its siblings and before the next forward, which is [`Error::StaleNorms`] otherwise: in
    /// training, after each step of the optimizer.
    ///
    /// It takes `d_out * d_in * rank` multiply-adds in f64, and allocates one row.
    ///
    /// # Errors
    /// [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter or a tensor of it was replaced by
    /// one that does not fit; [`Error::OutOfMemory`].
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.refresh(&self.linear.base()?)
    }
}
