//! The forward.

use nf4_kernels::Float;

use super::LoRALayer;
use crate::error::{Error, or_panic};
use crate::layer::forward::{Forward, Term};
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;

/// Forward.
impl LoRALayer {
    /// `y = W x + scale * B (A x) + bias`, of one vector `x` or of each vector of a batch `[batch, d_in]`; while merged
    /// `y = W' x + bias` with the merged weight. The result is `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch. A NaN or infinity in `x` gives what IEEE 754 says; every
    /// NaN in `y` is [`f32::NAN`]. A layer without inputs takes an empty `x` for one vector.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// As [`Self::forward`].
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::OutOfMemory`]; unless merged also
    /// [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter or a tensor of it was replaced by
    /// one that does not fit, and [`Error::StaleNorms`] with `DoRA`, see [`Self::refresh_dora`].
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.plan().of_tensor(x, self.rank(), &|_| self.terms())
    }

    /// As [`Self::forward`], in buffers of the caller, without allocation, with inputs and outputs in f32, f16 or bf16.
    /// Inputs are converted to f32 exactly; outputs are those for f32, rounded once to nearest even.
    ///
    /// `scratch` comes from [`Self::scratch`] for at least this batch. A layer without inputs counts vectors by their
    /// outputs.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; unless merged also [`Error::MatrixLength`], [`Error::Mismatch`]
    /// or [`Error::Shape`] if the adapter or a tensor of it was replaced by one that does not fit, and
    /// [`Error::StaleNorms`] with `DoRA`, see [`Self::refresh_dora`]. `y` may have been written to.
    pub fn forward_into<X: Float, Y: Float>(&self, x: &[X], scratch: &mut Scratch, y: &mut [Y]) -> Result<(), Error> {
        self.plan().of_slice(x, &|_| self.terms(), scratch, y)
    }

    /// Working memory for forwards of up to `batch` vectors: for each of them its inputs, the rank, and its outputs, all
    /// f32.
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

    /// What the adapter adds to a product: nothing while it is merged.
    fn terms(&self) -> impl Iterator<Item = Term<'_>> + Clone {
        (!self.is_merged()).then_some(Term { adapter: &self.adapter, weight: 1.0 }).into_iter()
    }
}
