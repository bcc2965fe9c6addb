//! Training: gradients, and the norms of `DoRA`.

use super::LoRALayer;
use crate::error::{Error, or_panic};
use crate::tensor::Tensor;

/// Training, of merged and unmerged layers alike.
impl LoRALayer {
    /// Adds the gradients of `A`, `B` and, with `DoRA`, the magnitude to those of the tensors ([`Tensor::grad`]), and
    /// returns the gradient of the input, `[batch, d_in]`. `x` is one vector or a batch `[batch, d_in]`, and `dy` is
    /// `[batch, d_out]`. [`QLoRALayer`](crate::QLoRALayer) has the formulas.
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
        self.adapter.try_backward(&self.frozen.base(), x.data(), dy.data())
    }

    /// Sets the gradients of the adapter to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.gradients_mut().zero_grad();
    }

    /// Recomputes the norms of the adapted weight if they are stale; does nothing without `DoRA`. Call it after the adapter
    /// was borrowed mutably and before the next forward.
    ///
    /// # Errors
    /// The [errors of all layers](crate#errors).
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.refresh(&self.frozen.base())
    }
}
