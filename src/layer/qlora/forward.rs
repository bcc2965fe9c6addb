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
    /// `y = W x + scale * B (A x) + bias`, of one vector `x` or of each vector of a batch `[batch, d_in]`. The result is
    /// `[batch, d_out]`.
    ///
    /// A vector has the same outputs, bit for bit, in every batch. If one of its values is NaN or infinite, all its
    /// outputs are [`f32::NAN`] (in f32 arithmetic: what IEEE 754 says). A layer without inputs takes an empty `x` for
    /// one vector.
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
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::OutOfMemory`];
    /// [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter or a tensor of it was replaced by
    /// one that does not fit; [`Error::StaleNorms`] with `DoRA`, see [`Self::refresh_dora`].
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.linear.forward()?.of_tensor(x, self.rank(), &|_| self.terms())
    }

    /// As [`Self::forward`], in buffers of the caller, without allocation, with inputs and outputs in f32, f16 or bf16.
    /// Inputs are converted to f32 exactly; outputs are those for f32, rounded once to nearest even.
    ///
    /// `scratch` comes from [`Self::scratch`] for at least this batch or was grown for it; see [`Scratch`] for its size. A
    /// layer without inputs counts vectors by their outputs.
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `y` does not have
    /// `batch * d_out` values or `scratch` is too small; [`Error::MatrixLength`], [`Error::Mismatch`] or
    /// [`Error::Shape`] if the adapter or a tensor of it was replaced by one that does not fit; [`Error::StaleNorms`]
    /// with `DoRA`, see [`Self::refresh_dora`]. `y` may have been written to.
    pub fn forward_into<X: Float, Y: Float>(&self, x: &[X], scratch: &mut Scratch, y: &mut [Y]) -> Result<(), Error> {
        self.linear.forward()?.of_slice(x, &|_| self.terms(), scratch, y)
    }

    /// As [`Self::forward_into`], with inputs that [`Self::quantize_inputs`] of this layer, or of another one, prepared.
    /// The bits are the same.
    ///
    /// # Errors
    /// [`Error::Shape`] if the inputs do not have `d_in` values or were quantized for another group or by other kernels,
    /// if `y` does not have `batch * d_out` values, or if `scratch` is too small; [`Error::Arithmetic`] if they were
    /// quantized for another arithmetic; [`Error::MatrixLength`], [`Error::Mismatch`] or [`Error::Shape`] if the adapter
    /// or a tensor of it was replaced by one that does not fit; [`Error::StaleNorms`] with `DoRA`, see
    /// [`Self::refresh_dora`]. `y` may have been written to.
    pub fn forward_shared<Y: Float>(
        &self,
        inputs: &Inputs<'_>,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.linear.forward()?.run(inputs, &|_| self.terms(), &mut scratch.work, y)
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

    /// Working memory for forwards of up to `batch` vectors.
    ///
    /// # Panics
    /// If there is no memory for it; [`Scratch::reserve`] returns an error instead.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.linear.forward().and_then(|forward| forward.scratch(self.rank(), batch)))
    }

    /// What the adapter adds to a product.
    fn terms(&self) -> impl Iterator<Item = Term<'_>> + Clone {
        core::iter::once(Term { adapter: &self.adapter, weight: 1.0 })
    }
}
