//! A flat vector of f32 and its gradient.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::buffer;
use crate::error::{Error, check_len};

/// A flat vector of f32 values, the inputs, outputs and parameters of layers, with a gradient of the same length if it is
/// trained.
///
/// It does not know its shape, which is up to the layer that uses it. It takes exactly 4 bytes per value, and 4 more once
/// there is a gradient. Values may be anything, including NaN.
#[derive(Debug, Clone)]
pub struct Tensor {
    data: Box<[f32]>,
    grad: Option<Box<[f32]>>,
    requires_grad: bool,
}

impl Tensor {
    /// A tensor with the given values. Spare capacity of the vector is freed.
    #[must_use]
    pub fn from_vec(data: Vec<f32>, requires_grad: bool) -> Self {
        Self { data: data.into_boxed_slice(), grad: None, requires_grad }
    }

    /// A tensor of `len` zeros.
    #[must_use]
    pub fn zeros(len: usize, requires_grad: bool) -> Self {
        Self::from_vec(vec![0.0; len], requires_grad)
    }

    /// A tensor of `rows * cols` zeros that is not trained, if there is room for it.
    pub(crate) fn try_zeros(rows: usize, cols: usize) -> Result<Self, Error> {
        Ok(Self::from_vec(buffer::zeros(rows, cols)?, false))
    }

    /// The values.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The values, mutably.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Returns the values and drops the gradient.
    #[must_use]
    pub fn into_vec(self) -> Vec<f32> {
        self.data.into_vec()
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Bytes on the heap: 4 per value, and another 4 if there is a gradient.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val(self.data()) + self.grad().map_or(0, size_of_val)
    }
}

/// The gradient.
impl Tensor {
    /// Whether this tensor is trained, so that gradients are accumulated for it.
    #[must_use]
    pub fn requires_grad(&self) -> bool {
        self.requires_grad
    }

    /// The gradient, one value for each value of the tensor; `None` until one is accumulated.
    #[must_use]
    pub fn grad(&self) -> Option<&[f32]> {
        self.grad.as_deref()
    }

    /// The gradient, mutably; zeros are allocated if there is none. `None` if [`Self::requires_grad`] is false.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn grad_mut(&mut self) -> Result<Option<&mut [f32]>, Error> {
        if self.requires_grad && self.grad.is_none() {
            self.grad = Some(buffer::zeros(1, self.len())?.into_boxed_slice());
        }
        Ok(self.grad.as_deref_mut().filter(|_| self.requires_grad))
    }

    /// Adds `grad` to the gradient; does nothing if [`Self::requires_grad`] is false.
    ///
    /// # Errors
    /// [`Error::Shape`] if `grad` does not have the length of the tensor; [`Error::OutOfMemory`] if there is no memory for
    /// a gradient.
    pub fn accumulate_grad(&mut self, grad: &[f32]) -> Result<(), Error> {
        check_len("gradient", self.len(), grad.len())?;
        if let Some(sum) = self.grad_mut()? {
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
        }
        Ok(())
    }

    /// Sets the gradient to zero, keeping its memory for the next step.
    pub fn zero_grad(&mut self) {
        if let Some(grad) = &mut self.grad {
            grad.fill(0.0);
        }
    }

    /// Drops the gradient and its memory.
    pub fn clear_grad(&mut self) {
        self.grad = None;
    }

    /// The values, mutably, and the gradient, for a step of an optimizer.
    pub fn data_mut_and_grad(&mut self) -> (&mut [f32], Option<&[f32]>) {
        (&mut self.data, self.grad.as_deref())
    }
}
