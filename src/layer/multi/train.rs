//! The gradient of the input through the frozen weight.

use super::MultiAdapterLayer;
use crate::adapter::backward::BackwardScratch;
use crate::error::{Error, check_len};

/// Training of what comes before the layer.
impl MultiAdapterLayer {
    /// Computes the gradient of the input of the weight alone, without adapters: `dx = dy W`, from upstream gradients `dy`
    /// `[batch, d_out]`, in f32 if that is the arithmetic of the layer, and else by the transposed 16x4 product, as
    /// in [`QLoRALayer::backward`](crate::QLoRALayer::backward), which also trains an adapter. `dx` is `[batch, d_in]`.
    ///
    /// `scratch` must be large enough for the batch, with an adapter of rank 0 ([`BackwardScratch::reserve`]). Nothing is
    /// allocated, except that a large f32 product of a single vector on several threads does.
    ///
    /// # Errors
    /// [`Error::Shape`] if the length of `dy` is not a multiple of `d_out`, if `dx` does not have `batch * d_in` values, or if
    /// `scratch` is too small; and [those of all layers](crate#errors).
    pub fn base_backward_into(&self, dy: &[f32], scratch: &mut BackwardScratch, dx: &mut [f32]) -> Result<(), Error> {
        let base = self.linear.base()?;
        let batch = dy.len() / base.d_out().max(1);
        check_len("output gradient", batch.saturating_mul(base.d_out()), dy.len())?;
        // Without outputs, any number of vectors has gradients of zero.
        if base.d_out() > 0 {
            check_len("input gradient", batch.saturating_mul(base.d_in()), dx.len())?;
        }
        if dy.is_empty() || dx.is_empty() {
            dx.fill(0.0);
            return Ok(());
        }
        base.transposed(dy, scratch.gradients(), dx)
    }
}
