//! The frozen part of a layer: an NF4 weight, a bias, and what computes with them.

use alloc::boxed::Box;
use alloc::vec::Vec;

use nf4_kernels::{Float, Kernels};

use crate::error::{Error, check_batch, check_finite, check_len};
use crate::layer::forward::{Forward, Term};
use crate::layer::scratch::Scratch;
use crate::parallel::Executor;
use crate::weight::base::Base;
use crate::weight::inputs::{Arithmetic, Inputs, InputsBuf};
use crate::weight::quantized::Quantized4Bit;

/// `y = W x + bias` with a packed `W` `[d_out, d_in]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) weight: Quantized4Bit,
    pub(crate) bias: Option<Box<[f32]>>,
    pub(crate) executor: Executor,
    pub(crate) arithmetic: Arithmetic,
}

impl Linear {
    pub(crate) fn new(weight: Quantized4Bit) -> Self {
        Self { weight, bias: None, executor: Executor::detect(), arithmetic: Arithmetic::default() }
    }

    pub(crate) fn with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        Ok(Self { bias: Some(checked_bias(bias, self.d_out())?), ..self })
    }

    pub(crate) fn d_out(&self) -> usize {
        self.weight.rows()
    }

    pub(crate) fn d_in(&self) -> usize {
        self.weight.cols()
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.executor.kernels
    }

    /// The weight, for adapters.
    ///
    /// # Errors
    /// [`Error::Shape`] if shared bytes are no longer what they were.
    pub(crate) fn base(&self) -> Result<Base<'_>, Error> {
        Ok(Base::packed(self.weight.try_view()?, self.arithmetic, &self.executor))
    }

    /// Scratch for batches of vectors whose adapters have ranks that add up to at most `rank`.
    pub(crate) fn scratch(&self, rank: usize, batch: usize) -> Result<Scratch, Error> {
        let mut scratch = Scratch::new();
        scratch.try_reserve(self.d_out(), self.d_in(), self.weight.block_size(), rank, batch)?;
        Ok(scratch)
    }

    /// Inputs `[batch, d_in]`, converted and quantized for this layer and its like.
    pub(crate) fn quantize_inputs<'b, X: Float>(
        &self,
        x: &[X],
        buffers: &'b mut InputsBuf,
    ) -> Result<Inputs<'b>, Error> {
        self.prepare(x, check_batch(x.len(), self.d_in())?, buffers)
    }

    fn prepare<'b, X: Float>(&self, x: &[X], batch: usize, buffers: &'b mut InputsBuf) -> Result<Inputs<'b>, Error> {
        let shape = [batch, self.d_in()];
        buffers.prepare(x, shape, self.weight.block_size(), self.arithmetic, self.kernels())
    }

    /// The forward of a batch, `x` `[batch, d_in]`, `y` `[batch, d_out]`.
    pub(crate) fn forward<'t, X: Float, Y: Float, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        x: &[X],
        terms: &impl Fn(usize) -> T,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        let batch = batch_of(x.len(), y.len(), self.d_out(), self.d_in())?;
        let inputs = self.prepare(x, batch, &mut scratch.inputs)?;
        Forward { base: self.base()?, bias: self.bias.as_deref() }.run(&inputs, terms, &mut scratch.work, y)
    }

    /// The forward of inputs that were quantized before.
    pub(crate) fn forward_shared<'t, Y: Float, T: Iterator<Item = Term<'t>> + Clone>(
        &self,
        inputs: &Inputs<'_>,
        terms: &impl Fn(usize) -> T,
        scratch: &mut Scratch,
        y: &mut [Y],
    ) -> Result<(), Error> {
        Forward { base: self.base()?, bias: self.bias.as_deref() }.run(inputs, terms, &mut scratch.work, y)
    }
}

/// A bias, `[d_out]`, if it has that length and is finite.
pub(crate) fn checked_bias(bias: Vec<f32>, d_out: usize) -> Result<Box<[f32]>, Error> {
    check_len("bias", d_out, bias.len())?;
    check_finite("bias", &bias)?;
    Ok(bias.into_boxed_slice())
}

/// The number of vectors in `x` values that have `y` outputs.
///
/// Vectors without inputs are counted by their outputs; if there are no outputs either, there are none.
pub(crate) fn batch_of(x: usize, y: usize, d_out: usize, d_in: usize) -> Result<usize, Error> {
    if d_in > 0 || d_out == 0 {
        return check_batch(x, d_in);
    }
    check_len("input", 0, x)?;
    check_len("output", y - y % d_out, y)?;
    Ok(y / d_out)
}

/// The number of vectors in the `x` values of a tensor. Without inputs it is one.
pub(crate) fn batch_of_tensor(x: usize, d_in: usize) -> Result<usize, Error> {
    if x == 0 && d_in == 0 { Ok(1) } else { check_batch(x, d_in) }
}
