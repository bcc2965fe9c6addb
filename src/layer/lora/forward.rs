//! The forward.

use nf4_kernels::Float;

use super::LoRALayer;
use crate::error::{Error, or_panic};
use crate::layer::forward::{Forward, Term};
use crate::layer::linear::{batch_of, batch_of_tensor};
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;
use crate::weight::base::Base;

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
        let batch = batch_of_tensor(x.len(), self.d_in())?;
        let mut y = Tensor::try_zeros(batch, self.d_out())?;
        self.forward_into(x.data(), &mut self.try_scratch(batch)?, y.data_mut())?;
        Ok(y)
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
        let batch = batch_of(x.len(), y.len(), self.d_out(), self.d_in())?;
        let inputs = scratch.inputs.convert(x, [batch, self.d_in()])?;
        let base = Base::dense(self.base_weight().data(), self.d_out(), self.d_in(), &self.executor);
        let adapter = (!self.is_merged()).then_some(Term { adapter: &self.adapter, weight: 1.0 });
        Forward { base, bias: self.bias() }.run(&inputs, &|_| adapter.into_iter(), &mut scratch.work, y)
    }

    /// Working memory for forwards of up to `batch` vectors: for each of them its inputs, the rank, and its outputs, all
    /// f32.
    ///
    /// # Panics
    /// If there is no memory for it.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.try_scratch(batch))
    }

    fn try_scratch(&self, batch: usize) -> Result<Scratch, Error> {
        let mut scratch = Scratch::new();
        scratch.try_reserve_dense(self.d_out(), self.d_in(), self.rank(), batch)?;
        Ok(scratch)
    }
}
