//! The frozen part of a layer: an NF4 weight, a bias, and how to compute with them.

use alloc::boxed::Box;
use alloc::vec::Vec;

use nf4_kernels::{Float, Kernels};

use crate::error::{Error, check_batch, check_finite, check_len};
use crate::layer::forward::Forward;
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

    /// The forward, without adapters so far.
    ///
    /// # Errors
    /// [`Error::Shape`] if shared bytes are no longer what they were.
    pub(crate) fn forward(&self) -> Result<Forward<'_>, Error> {
        Ok(Forward { base: self.base()?, bias: self.bias.as_deref() })
    }

    /// Inputs `[batch, d_in]`, converted and quantized for this layer and others like it.
    pub(crate) fn quantize_inputs<'b, X: Float>(
        &self,
        x: &'b [X],
        buffers: &'b mut InputsBuf,
    ) -> Result<Inputs<'b, X>, Error> {
        self.base()?.prepare(x, check_batch(x.len(), self.d_in())?, true, buffers)
    }
}

/// A bias, `[d_out]`, if it has that length and is finite.
pub(crate) fn checked_bias(bias: Vec<f32>, d_out: usize) -> Result<Box<[f32]>, Error> {
    check_len("bias", d_out, bias.len())?;
    check_finite("bias", &bias)?;
    Ok(bias.into_boxed_slice())
}
