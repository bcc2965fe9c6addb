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
/// With `DoRA` and the gains `g` of the rows, `g dy` stands for `dy` in these, and the magnitude gets
/// `dm = sum over the batch of dy * (W x + scale * B (A x)) / norm`, from the f32 product; the norm counts as a
/// constant.
///
/// Every operation is rounded on its own in a fixed order, so that the bits are the same on every machine and with all
/// kernels and threads. `dy W` is computed from the packed bytes; no weight is dequantized in memory. If the arithmetic of
/// the layer is [`Arithmetic::F32`], it is computed in f32 ([`Kernels::gemm_transposed_f32`]), and else with integers
/// ([`Kernels::gemm_transposed`]), with a relative error of about `1.3e-4` in about half the time. Everything else is f32.
/// These are the gradients of the f32 forward, from which the 16x4 forward differs only by rounding.
///
/// The base weight and the bias are frozen, as in `QLoRA`, and have no gradient. There is no dropout; a training loop can
/// apply it to `x`.
///
/// [`Arithmetic::F32`]: crate::Arithmetic::F32
/// [`Kernels::gemm_transposed`]: nf4_kernels::Kernels::gemm_transposed
/// [`Kernels::gemm_transposed_f32`]: nf4_kernels::Kernels::gemm_transposed_f32
impl QLoRALayer {
    /// Adds the gradients of `A`, `B` and, with `DoRA`, the magnitude to those of the tensors ([`Tensor::grad`]), and
    /// returns the gradient of the input, `[batch, d_in]`. `x` is one vector or a batch `[batch, d_in]`, and `dy` is
    /// `[batch, d_out]`.
    ///
    /// Gradients accumulate over calls until [`Self::zero_grad`]. NaN and infinity give what IEEE 754 and the specification
    /// of the product say; every NaN is [`f32::NAN`]. The optimizers of this crate refuse such gradients. Stale norms of
    /// `DoRA` are recomputed.
    ///
    /// # Panics
    /// Where [`Self::try_backward`] returns an error.
    #[track_caller]
    pub fn backward(&mut self, x: &Tensor, dy: &Tensor) -> Tensor {
        or_panic(self.try_backward(x, dy))
    }

    /// Like [`Self::backward`], but returns errors.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `dy` does not have
    /// `batch * d_out` values; and [those of all layers](crate#errors). No gradient has then changed.
    pub fn try_backward(&mut self, x: &Tensor, dy: &Tensor) -> Result<Tensor, Error> {
        self.adapter.try_backward(&self.linear.base()?, x.data(), dy.data())
    }

    /// Like [`Self::try_backward`], but writes the gradient of the input to a buffer that the caller provides, and does not
    /// allocate once `A` and `B` have gradients (except that a large product of a single vector with `W^T` on several
    /// threads does). Without `dx`, as in the first layer of a model, the packed weights are read only for the magnitude of
    /// `DoRA`.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `dy` does not have
    /// `batch * d_out` values, `dx` not the length of `x`, or if `scratch` is too small; and
    /// [those of all layers](crate#errors). No gradient of the adapter has then changed.
    pub fn backward_into(
        &mut self,
        x: &[f32],
        dy: &[f32],
        scratch: &mut BackwardScratch,
        dx: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.adapter.backward(&self.linear.base()?, x, dy, scratch, dx)
    }

    /// Allocates working memory for [`Self::backward_into`] of up to `batch` vectors.
    ///
    /// # Panics
    /// If there is no memory for it. [`BackwardScratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn backward_scratch(&self, batch: usize) -> BackwardScratch {
        let mut scratch = BackwardScratch::new();
        or_panic(scratch.reserve(self.d_out(), self.d_in(), self.rank(), batch));
        scratch
    }

    /// Sets the gradients of the adapter to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.gradients_mut().zero_grad();
    }

    /// Recomputes the norms of the adapted weight if they are stale; does nothing without `DoRA`. Call it after the adapter
    /// was borrowed mutably ([`Self::adapter_mut`], [`Self::trainable_params`] and so on) and before the next forward, which
    /// otherwise fails with [`Error::StaleNorms`]; in training, that is after each step of the optimizer.
    ///
    /// It takes `d_out * d_in * rank` multiply-adds in f64, and allocates a row for each thread.
    ///
    /// # Errors
    /// The [errors of all layers](crate#errors).
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.refresh(&self.linear.base()?)
    }
}
