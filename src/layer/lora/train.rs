//! Training: gradients, and the norms of `DoRA`.

use super::LoRALayer;
use crate::error::{Error, or_panic};
use crate::tensor::Tensor;

/// Training. Whether the layer is merged does not matter.
impl LoRALayer {
    /// Adds the gradients of the adapter for inputs `x` `[batch, d_in]` and upstream gradients `dy` `[batch, d_out]`
    /// to those of its tensors, and returns that of the input. All as [`crate::QLoRALayer::backward`].
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
        self.adapter.try_backward(&self.frozen.base(), x.data(), dy.data())
    }

    /// Sets the gradients of the adapter to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.gradients_mut().zero_grad();
    }

    /// Recomputes the norms of the adapted weight if they are stale; does nothing without `DoRA`. To be called after
    /// [`Self::adapter_mut`] and its siblings and before the next forward.
    ///
    /// # Errors
    /// [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter or a tensor of it was replaced by
    /// one that does not fit; [`Error::OutOfMemory`].
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.refresh(&self.frozen.base())
    }
}
