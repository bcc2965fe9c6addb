//! The forwards of the layers on an NF4 base: one vector or a batch, with or without buffers of the caller, in every
//! type. What all of them compute is in [`crate::layer::linear`].

use nf4_kernels::Float;

use crate::error::{Error, check_batch, check_len, or_panic};
use crate::layer::linear::Term;
use crate::layer::multi::MultiAdapterLayer;
use crate::layer::qlora::QLoRALayer;
use crate::layer::scratch::Scratch;
use crate::tensor::Tensor;

impl QLoRALayer {
    /// `y = W x + scale * B (A x) + bias`. `x` has `d_in` values, `y` has `d_out`.
    ///
    /// If a value of `x` is NaN or infinite, every output is [`f32::NAN`] (in f32 arithmetic: what IEEE 754 says).
    ///
    /// # Panics
    /// Where [`Self::try_forward`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// As [`Self::forward`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values, or if there is no memory for the outputs;
    /// [`Error::MatrixLength`] if `A` or `B` was replaced by a tensor of another length; [`Error::StaleNorms`] with
    /// `DoRA`, see [`Self::refresh_dora`].
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let mut y = Tensor::try_zeros(1, self.d_out())?;
        self.forward_into(x.data(), &mut self.linear.scratch(self.rank(), 1)?, y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward`], in buffers of the caller and without allocation. `scratch` comes from [`Self::scratch`] or
    /// was grown for this layer; see [`Scratch`] for its size.
    ///
    /// # Errors
    /// Those of [`Self::try_forward`]; [`Error::Shape`] if `y` does not have `d_out` values or `scratch` is too small.
    /// `y` may then have been written to.
    pub fn forward_into(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) -> Result<(), Error> {
        check_len("input", self.d_in(), x.len())?;
        check_len("output", self.d_out(), y.len())?;
        self.forward_batch_into(x, scratch, y)
    }

    /// The forward of each vector of a batch: `x` is `[batch, d_in]`, the result `[batch, d_out]`. Each output has the
    /// bits that [`Self::forward`] gives for its vector. A layer without inputs takes every batch for an empty one.
    ///
    /// # Panics
    /// Where [`Self::try_forward_batch`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward_batch(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward_batch(x))
    }

    /// As [`Self::forward_batch`].
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if there is no memory for the
    /// outputs; [`Error::MatrixLength`] if `A` or `B` was replaced by a tensor of another length;
    /// [`Error::StaleNorms`] with `DoRA`, see [`Self::refresh_dora`].
    pub fn try_forward_batch(&self, x: &Tensor) -> Result<Tensor, Error> {
        let batch = check_batch(x.len(), self.d_in())?;
        let mut y = Tensor::try_zeros(batch, self.d_out())?;
        self.forward_batch_into(x.data(), &mut self.linear.scratch(self.rank(), batch)?, y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward_batch`], in buffers of the caller and without allocation. `scratch` comes from
    /// [`Self::scratch_for_batch`] for at least this batch or was grown for it; see [`Scratch`] for its size.
    ///
    /// # Errors
    /// Those of [`Self::try_forward_batch`]; [`Error::Shape`] if `y` does not have `batch * d_out` values or `scratch`
    /// is too small. `y` may then have been written to.
    pub fn forward_batch_into(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) -> Result<(), Error> {
        self.linear.forward(x, |_| self.terms(), scratch.work(), y)
    }

    /// As [`Self::forward_batch_into`], for inputs and outputs in f32, f16 or bf16; one vector is a batch of one.
    /// Inputs are converted to f32 in the scratch, exactly; outputs are those for f32, rounded once to nearest even.
    ///
    /// `scratch` comes from [`Self::scratch_for_batch_as`] or was grown by [`Scratch::reserve_inputs`] too.
    ///
    /// # Errors
    /// Those of [`Self::forward_batch_into`].
    pub fn forward_batch_into_as<X: Float, Y: Float>(
        &self,
        x: &[X],
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.linear.forward_as(x, |_| self.terms(), scratch, y)
    }

    /// Working memory for [`Self::forward_into`].
    #[must_use]
    pub fn scratch(&self) -> Scratch {
        self.scratch_for_batch(1)
    }

    /// Working memory for [`Self::forward_batch_into`] with up to `batch` vectors.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[must_use]
    #[track_caller]
    pub fn scratch_for_batch(&self, batch: usize) -> Scratch {
        or_panic(self.linear.scratch(self.rank(), batch))
    }

    /// Working memory for [`Self::forward_batch_into_as`] with up to `batch` vectors.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[must_use]
    pub fn scratch_for_batch_as(&self, batch: usize) -> Scratch {
        let mut scratch = self.scratch_for_batch(batch);
        scratch.reserve_inputs(self.d_in(), batch);
        scratch
    }

    /// What the adapter adds to a product.
    fn terms(&self) -> impl Iterator<Item = Term<'_>> {
        core::iter::once(Term { adapter: &self.adapter, weight: 1.0 })
    }
}

/// With the active adapters.
impl MultiAdapterLayer {
    /// The product of one vector with the active adapters. `x` has `d_in` values, `y` has `d_out`. NaN and infinity do
    /// what they do in [`crate::QLoRALayer::forward`].
    ///
    /// # Panics
    /// Where [`Self::try_forward`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// As [`Self::forward`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values, or if there is no memory for the outputs.
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let mut y = Tensor::try_zeros(1, self.d_out())?;
        self.forward_into(x.data(), &mut self.try_scratch(1)?, y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward`], in buffers of the caller and without allocation; `scratch` as for
    /// [`Self::forward_batch_into`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values, `y` not `d_out`, or `scratch` is too small.
    pub fn forward_into(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) -> Result<(), Error> {
        check_len("input", self.d_in(), x.len())?;
        check_len("output", self.d_out(), y.len())?;
        self.forward_batch_into(x, scratch, y)
    }

    /// The product of each vector of a batch with the active adapters: `x` is `[batch, d_in]`, the result `[batch,
    /// d_out]`. Each output has the bits that [`Self::forward`] gives. A layer without inputs takes every batch for an
    /// empty one.
    ///
    /// # Panics
    /// Where [`Self::try_forward_batch`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward_batch(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward_batch(x))
    }

    /// As [`Self::forward_batch`].
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if there is no memory for the
    /// outputs.
    pub fn try_forward_batch(&self, x: &Tensor) -> Result<Tensor, Error> {
        let batch = check_batch(x.len(), self.d_in())?;
        let mut y = Tensor::try_zeros(batch, self.d_out())?;
        self.forward_batch_into(x.data(), &mut self.try_scratch(batch)?, y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward_batch`], in buffers of the caller and without allocation. `scratch` comes from
    /// [`Self::scratch`] for at least this batch and adapters, or was grown for them.
    ///
    /// # Errors
    /// Those of [`Self::try_forward_batch`]; [`Error::Shape`] if `y` does not have `batch * d_out` values or `scratch`
    /// is too small. `y` may then have been written to.
    pub fn forward_batch_into(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) -> Result<(), Error> {
        self.linear.forward(x, |_| self.active_terms(), scratch.work(), y)
    }

    /// As [`Self::forward_batch_into`], for inputs and outputs in f32, f16 or bf16; see
    /// [`crate::QLoRALayer::forward_batch_into_as`]. `scratch` also needs [`Scratch::reserve_inputs`].
    ///
    /// # Errors
    /// Those of [`Self::forward_batch_into`].
    pub fn forward_batch_into_as<X: Float, Y: Float>(
        &self,
        x: &[X],
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.linear.forward_as(x, |_| self.active_terms(), scratch, y)
    }

    /// Working memory for batches of up to `batch` vectors with any choice of the adapters that there are now: as
    /// [`Scratch`] says, where the rank is the sum of all.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[must_use]
    #[track_caller]
    pub fn scratch(&self, batch: usize) -> Scratch {
        or_panic(self.try_scratch(batch))
    }

    fn try_scratch(&self, batch: usize) -> Result<Scratch, Error> {
        self.linear.scratch(self.sum_of_ranks(), batch)
    }
}

/// With an adapter of its own, or none, for each vector. Which adapters are active does not matter.
impl MultiAdapterLayer {
    /// The product of each vector of a batch with its adapter: `x` is `[batch, d_in]`, `adapters` has `batch` names,
    /// the result is `[batch, d_out]`. The bits are those that a forward of the vector with its adapter alone gives.
    ///
    /// # Panics
    /// Where [`Self::try_forward_batch_with`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward_batch_with(&self, x: &Tensor, adapters: &[Option<&str>]) -> Tensor {
        or_panic(self.try_forward_batch_with(x, adapters))
    }

    /// As [`Self::forward_batch_with`].
    ///
    /// # Errors
    /// [`Error::Batch`] if the length of `x` is not a multiple of `d_in`; [`Error::Shape`] if `adapters` does not have
    /// one entry for each vector, or if there is no memory for the outputs; [`Error::UnknownAdapter`] with the first name that there is no adapter of.
    pub fn try_forward_batch_with(&self, x: &Tensor, adapters: &[Option<&str>]) -> Result<Tensor, Error> {
        let batch = check_batch(x.len(), self.d_in())?;
        let mut y = Tensor::try_zeros(batch, self.d_out())?;
        self.forward_batch_with_into(x.data(), adapters, &mut self.try_scratch(batch)?, y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward_batch_with`], in buffers of the caller and without allocation, but that of an error.
    ///
    /// # Errors
    /// Those of [`Self::try_forward_batch_with`]; [`Error::Shape`] if `y` does not have `batch * d_out` values or
    /// `scratch` is too small. `y` may then have been written to.
    pub fn forward_batch_with_into(
        &self,
        x: &[f32],
        adapters: &[Option<&str>],
        scratch: &mut Scratch,
        y: &mut [f32],
    ) -> Result<(), Error> {
        self.check_choice(x, adapters, y)?;
        self.linear.forward(x, |n| self.chosen_term(adapters[n]), scratch.work(), y)
    }

    /// As [`Self::forward_batch_with_into`], for inputs and outputs in f32, f16 or bf16; see
    /// [`crate::QLoRALayer::forward_batch_into_as`]. `scratch` also needs [`Scratch::reserve_inputs`].
    ///
    /// # Errors
    /// Those of [`Self::forward_batch_with_into`].
    pub fn forward_batch_with_into_as<X: Float, Y: Float>(
        &self,
        x: &[X],
        adapters: &[Option<&str>],
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        self.check_choice(x, adapters, y)?;
        self.linear.forward_as(x, |n| self.chosen_term(adapters[n]), scratch, y)
    }

    fn check_choice<X, Y>(&self, x: &[X], adapters: &[Option<&str>], y: &[Y]) -> Result<(), Error> {
        check_len("adapters of the batch", self.linear.check_batch(x, y)?, adapters.len())?;
        self.check_names(adapters.iter().flatten().copied())
    }
}
