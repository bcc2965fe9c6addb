//! The forward.

use nf4_kernels::Float;

use super::LoRALayer;
use crate::error::{Error, or_panic};
use crate::layer::forward::{Forward, Term};
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;

/// Forward.
impl LoRALayer {
    /// Computes `y = W x + scale * B (A x) + bias` for one vector `x`, or for each vector of a batch `[batch, d_in]`; while
    /// merged, `y = W' x + bias` with the merged weight `W'`. The result is `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch. NaN and infinity in `x` give what IEEE 754 says; every
    /// NaN in `y` is [`f32::NAN`]. If the layer has no inputs, an empty `x` counts as one vector.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// Like [`Self::forward`], but returns errors.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; unless merged, [`Error::StaleNorms`] if a `DoRA`
    /// adapter was changed and [`Self::refresh_dora`] not called; and [those of all layers](crate#errors).
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.plan().of_tensor(x, self.rank(), &|_| self.terms())
    }

    /// Like [`Self::forward`], but in buffers that the caller provides, without allocating, and with inputs and outputs in
    /// f32, f16 or bf16. Inputs are converted to f32 exactly; outputs are computed in f32 and rounded once, to nearest even.
    ///
    /// `scratch` must come from [`Self::scratch`] for at least this batch. If the layer has no inputs, the length of `y`
    /// gives the batch.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; unless merged, [`Error::StaleNorms`] if a `DoRA` adapter was
    /// changed and [`Self::refresh_dora`] not called; and [those of all layers](crate#errors). `y` may then be partly
    /// written.
    pub fn forward_into<X: Float, Y: Float>(&self, x: &[X], scratch: &mut Scratch, y: &mut [Y]) -> Result<(), Error> {
        self.plan().of_slice(x, &|_| self.terms(), scratch, y)
    }

    /// Allocates working memory for forwards of up to `batch` vectors: `d_in + rank + d_out` f32 for each.
    ///
    /// # Panics
    /// If there is no memory for it.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.plan().scratch(self.rank(), batch))
    }

    fn plan(&self) -> Forward<'_> {
        Forward { base: self.frozen.with(self.base_weight()), bias: self.bias() }
    }

    /// The adapter, for a forward; none while it is merged.
    fn terms(&self) -> impl Iterator<Item = Term<'_>> + Clone {
        (!self.is_merged()).then_some(Term { adapter: &self.adapter, weight: 1.0 }).into_iter()
    }
}
