//! The forward.

use nf4_kernels::Float;

use super::MultiAdapterLayer;
use super::set::AdapterId;
use crate::error::{Error, check_len, or_panic};
use crate::layer::forward::Term;
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;
use crate::weight::inputs::{Inputs, InputsBuf};

/// Which adapters a forward of a [`MultiAdapterLayer`] uses.
#[derive(Debug, Clone, Copy)]
pub enum Adapters<'a> {
    /// The active ones ([`MultiAdapterLayer::set_active`]), for every vector.
    Active,
    /// One, or none, for each vector of the batch. Which ones are active does not matter.
    PerVector(&'a [Option<AdapterId>]),
}

/// Forward.
impl MultiAdapterLayer {
    /// The product of one vector `x` with its adapters, or of each vector of a batch `[batch, d_in]`. The result is
    /// `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch and whatever the adapters of others. NaN and infinity
    /// do what they do in [`crate::QLoRALayer::forward`]. A layer without inputs takes an empty `x` for one vector.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor, adapters: Adapters<'_>) -> Tensor {
        or_panic(self.try_forward(x, adapters))
    }

    /// As [`Self::forward`].
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::OutOfMemory`]; with
    /// [`Adapters::PerVector`] also [`Error::Shape`] if there is not one entry for each vector, and
    /// [`Error::RemovedAdapter`] if the adapter of one was removed.
    pub fn try_forward(&self, x: &Tensor, adapters: Adapters<'_>) -> Result<Tensor, Error> {
        let forward = self.linear.forward()?;
        self.check_choice(adapters, forward.batch_of_tensor(x.len())?)?;
        forward.of_tensor(x, self.sum_of_ranks(), &|n| self.terms(adapters, n))
    }

    /// As [`Self::forward`], in buffers of the caller, without allocation, with inputs and outputs in f32, f16 or bf16.
    /// Inputs are converted to f32 exactly; outputs are those for f32, rounded once to nearest even.
    ///
    /// `scratch` comes from [`Self::scratch`] for at least this batch and these adapters, or was grown for them. A layer
    /// without inputs counts vectors by their outputs.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; with [`Adapters::PerVector`] also [`Error::Shape`] if there is
    /// not one entry for each vector, and [`Error::RemovedAdapter`] if the adapter of one was removed. `y` may have been
    /// written to.
    pub fn forward_into<X: Float, Y: Float>(
        &self,
        x: &[X],
        adapters: Adapters<'_>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let forward = self.linear.forward()?;
        self.check_choice(adapters, forward.batch_of(x.len(), y.len())?)?;
        forward.of_slice(x, &|n| self.terms(adapters, n), scratch, y)
    }

    /// As [`Self::forward_into`], with inputs that [`Self::quantize_inputs`] of this layer, or of another one, prepared.
    /// The bits are the same.
    ///
    /// # Errors
    /// [`Error::Shape`] if the inputs do not have `d_in` values or were quantized for another group or by other kernels,
    /// if `y` does not have `batch * d_out` values, or if `scratch` is too small; [`Error::Arithmetic`] if they were
    /// quantized for another arithmetic; with [`Adapters::PerVector`] also [`Error::Shape`] if there is not one entry for
    /// each vector, and [`Error::RemovedAdapter`] if the adapter of one was removed. `y` may have been written to.
    pub fn forward_shared<Y: Float>(
        &self,
        inputs: &Inputs<'_>,
        adapters: Adapters<'_>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.check_choice(adapters, inputs.batch())?;
        self.linear.forward()?.run(inputs, &|n| self.terms(adapters, n), &mut scratch.work, y)
    }

    /// Converts and quantizes inputs `[batch, d_in]` for [`Self::forward_shared`], of this layer and of others with the
    /// same `d_in`, group ([`nf4_kernels::BlockSize::group`]), arithmetic and kernels.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `buffers` are too small, see
    /// [`InputsBuf::reserve`].
    pub fn quantize_inputs<'b, X: Float>(&self, x: &[X], buffers: &'b mut InputsBuf) -> Result<Inputs<'b>, Error> {
        self.linear.quantize_inputs(x, buffers)
    }

    /// Working memory for forwards of up to `batch` vectors with any choice of the adapters that there are now: as
    /// [`Scratch`] says, where the rank is the sum of all.
    ///
    /// # Panics
    /// If there is no memory for it; [`Scratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.linear.forward().and_then(|forward| forward.scratch(self.sum_of_ranks(), batch)))
    }

    fn sum_of_ranks(&self) -> usize {
        self.adapters.iter().fold(0, |sum, named| sum.saturating_add(named.adapter.adapter().rank()))
    }

    /// `Ok` if there is a choice for each vector, and every adapter that was chosen.
    fn check_choice(&self, adapters: Adapters<'_>, batch: usize) -> Result<(), Error> {
        let Adapters::PerVector(ids) = adapters else { return Ok(()) };
        check_len("adapters of the batch", batch, ids.len())?;
        ids.iter().flatten().try_for_each(|id| self.adapters.get(*id).map(drop))
    }

    /// The adapters of vector `n`.
    fn terms<'t>(&'t self, adapters: Adapters<'t>, n: usize) -> impl Iterator<Item = Term<'t>> + Clone {
        let (active, chosen) = match adapters {
            Adapters::Active => (Some(self.adapters.active_terms()), None),
            Adapters::PerVector(ids) => (None, ids[n].and_then(|id| self.adapters.term(id))),
        };
        active.into_iter().flatten().chain(chosen)
    }
}
