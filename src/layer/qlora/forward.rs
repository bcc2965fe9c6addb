//! The forward.

use nf4_kernels::Float;

use super::QLoRALayer;
use crate::error::{Error, or_panic};
use crate::layer::forward::Term;
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;
use crate::weight::inputs::{Inputs, InputsBuf};

/// Forward.
impl QLoRALayer {
    /// Computes `y = W x + scale * B (A x) + bias` for one vector `x`, or for each vector of a batch `[batch, d_in]`. The
    /// result is `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch. If one of its values is NaN or infinite, all its outputs
    /// are [`f32::NAN`] (with [`Arithmetic::F32`], they are what IEEE 754 says). If the layer has no inputs, an empty `x`
    /// counts as one vector.
    ///
    /// # Panics
    /// Where [`Self::try_forward`] returns an error.
    ///
    /// [`Arithmetic::F32`]: crate::Arithmetic::F32
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// Like [`Self::forward`], but returns errors.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::StaleNorms`] if a `DoRA` adapter was
    /// changed and [`Self::refresh_dora`] not called; and [those of all layers](crate#errors).
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.linear.forward()?.of_tensor(x, self.rank(), &|_| self.terms())
    }

    /// Like [`Self::forward`], but in buffers that the caller provides, without allocating, and with inputs and outputs in
    /// f32, f16 or bf16. Inputs are converted to f32 exactly; outputs are computed in f32 and rounded once, to nearest even.
    ///
    /// `scratch` must be large enough for the batch: [`Self::scratch`] makes one, [`Scratch::reserve`] grows one. If the
    /// layer has no inputs, the length of `y` gives the batch.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; [`Error::StaleNorms`] if a `DoRA` adapter was changed and
    /// [`Self::refresh_dora`] not called; and [those of all layers](crate#errors). `y` may then be partly written.
    pub fn forward_into<X: Float, Y: Float>(&self, x: &[X], scratch: &mut Scratch, y: &mut [Y]) -> Result<(), Error> {
        self.linear.forward()?.of_slice(x, &|_| self.terms(), scratch, y)
    }

    /// Like [`Self::forward_into`], but with inputs that [`Self::quantize_inputs`] of this or another layer prepared. The
    /// bits are the same.
    ///
    /// # Errors
    /// [`Error::Shape`] if a vector of the inputs does not have `d_in` values, if the inputs were quantized for another
    /// group or by other kernels, if `y` does not have `batch * d_out` values, or if `scratch` is too small;
    /// [`Error::Arithmetic`] if the inputs were quantized for another arithmetic; [`Error::StaleNorms`] if a `DoRA` adapter
    /// was changed and [`Self::refresh_dora`] not called; and [those of all layers](crate#errors). `y` may then be partly
    /// written.
    pub fn forward_shared<X: Float, Y: Float>(
        &self,
        inputs: &Inputs<'_, X>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.linear.forward()?.run(inputs, &|_| self.terms(), &mut scratch.work, y)
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

    /// Allocates working memory for forwards of up to `batch` vectors.
    ///
    /// # Panics
    /// If there is no memory for it. [`Scratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.linear.forward().and_then(|forward| forward.scratch(self.rank(), batch)))
    }

    /// The adapter, for a forward.
    fn terms(&self) -> impl Iterator<Item = Term<'_>> + Clone {
        core::iter::once(Term { adapter: &self.adapter, weight: 1.0 })
    }
}
