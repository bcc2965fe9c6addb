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
    /// The active adapters ([`MultiAdapterLayer::set_active`]), for every vector.
    Active,
    /// One adapter, or none, for each vector of the batch, whether active or not.
    #[doc(alias = "adapter_names")]
    PerVector(&'a [Option<AdapterId>]),
}

/// Forward.
impl MultiAdapterLayer {
    /// Computes `y = W x + sum of weight * scale * B (A x) + bias` for one vector `x`, or for each vector of a batch
    /// `[batch, d_in]`, over the adapters of the vector. The result is `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch, whatever adapters the other vectors use. If one of its
    /// values is NaN or infinite, all its outputs are [`f32::NAN`] (with [`Arithmetic::F32`], they are what IEEE 754 says).
    /// If the layer has no inputs, an empty `x` counts as one vector.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    ///
    /// [`Arithmetic::F32`]: crate::Arithmetic::F32
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor, adapters: Adapters<'_>) -> Tensor {
        or_panic(self.try_forward(x, adapters))
    }

    /// Like [`Self::forward`], but returns errors.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; with [`Adapters::PerVector`] also
    /// [`Error::Shape`] if there is not one entry for each vector, and [`Error::RemovedAdapter`] if a chosen adapter was
    /// removed; and [those of all layers](crate#errors).
    pub fn try_forward(&self, x: &Tensor, adapters: Adapters<'_>) -> Result<Tensor, Error> {
        let forward = self.linear.forward()?;
        self.check_choice(adapters, forward.batch_of_tensor(x.len())?)?;
        forward.of_tensor(x, self.sum_of_ranks(), &|n| self.terms(adapters, n))
    }

    /// Like [`Self::forward`], but in buffers that the caller provides, without allocating, and with inputs and outputs in
    /// f32, f16 or bf16. Inputs are converted to f32 exactly; outputs are computed in f32 and rounded once, to nearest even.
    ///
    /// `scratch` must be large enough for the batch and its adapters: [`Self::scratch`] makes one, [`Scratch::reserve`]
    /// grows one. If the layer has no inputs, the length of `y` gives the batch.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; with [`Adapters::PerVector`] also [`Error::Shape`] if there is
    /// not one entry for each vector, and [`Error::RemovedAdapter`] if a chosen adapter was removed; and
    /// [those of all layers](crate#errors). `y` may then be partly written.
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

    /// Like [`Self::forward_into`], but with inputs that [`Self::quantize_inputs`] of this or another layer prepared. The
    /// bits are the same.
    ///
    /// # Errors
    /// [`Error::Shape`] if a vector of the inputs does not have `d_in` values, if the inputs were quantized for another
    /// group or by other kernels, if `y` does not have `batch * d_out` values, or if `scratch` is too small;
    /// [`Error::Arithmetic`] if the inputs were quantized for another arithmetic; with [`Adapters::PerVector`] also
    /// [`Error::Shape`] if there is not one entry for each vector, and [`Error::RemovedAdapter`] if a chosen adapter was
    /// removed; and [those of all layers](crate#errors). `y` may then be partly written.
    pub fn forward_shared<X: Float, Y: Float>(
        &self,
        inputs: &Inputs<'_, X>,
        adapters: Adapters<'_>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.check_choice(adapters, inputs.batch())?;
        self.linear.forward()?.run(inputs, &|n| self.terms(adapters, n), &mut scratch.work, y)
    }

    /// Converts and quantizes inputs `[batch, d_in]` for [`Self::forward_shared`] of this layer, and of every layer with
    /// the same `d_in`, group ([`BlockSize::activation_group`]), arithmetic and kernels.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `buffers` are too small
    /// ([`InputsBuf::reserve`] grows them).
    ///
    /// [`BlockSize::activation_group`]: nf4_kernels::BlockSize::activation_group
    pub fn quantize_inputs<'b, X: Float>(
        &self,
        x: &'b [X],
        buffers: &'b mut InputsBuf,
    ) -> Result<Inputs<'b, X>, Error> {
        self.linear.quantize_inputs(x, buffers)
    }

    /// Allocates working memory for forwards of up to `batch` vectors with any choice of the present adapters: it has room
    /// for the sum of their ranks.
    ///
    /// # Panics
    /// If there is no memory for it. [`Scratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.linear.forward().and_then(|forward| forward.scratch(self.sum_of_ranks(), batch)))
    }

    fn sum_of_ranks(&self) -> usize {
        self.adapters.iter().fold(0, |sum, named| sum.saturating_add(named.adapter.adapter().rank()))
    }

    /// `Ok` if there is a choice for each vector, and every chosen adapter exists.
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
