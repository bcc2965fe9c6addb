//! Room for the quantized gradients of the transposed 16x4 product.

use alloc::vec::Vec;

use nf4_kernels::Gradients;

use crate::buffer::{grow, take};
use crate::error::Error;

/// Buffers for the values and the scales of [`Gradients`].
#[derive(Debug, Clone, Default)]
pub(crate) struct GradientsBuf {
    values: Vec<i16>,
    scales: Vec<f32>,
}

impl GradientsBuf {
    pub(crate) const fn new() -> Self {
        Self { values: Vec::new(), scales: Vec::new() }
    }

    /// Grows the buffers, if necessary, for `batch` vectors of `rows` inputs.
    pub(crate) fn reserve(&mut self, rows: usize, batch: usize) -> Result<(), Error> {
        grow(&mut self.values, Gradients::values_len(rows).saturating_mul(batch))?;
        grow(&mut self.scales, Gradients::scales_len(rows).saturating_mul(batch))
    }

    /// What `batch` vectors of `rows` inputs need.
    pub(crate) fn take(&mut self, rows: usize, batch: usize) -> Result<(&mut [i16], &mut [f32]), Error> {
        let what = "scratch for the backward";
        Ok((
            take(what, &mut self.values, Gradients::values_len(rows).saturating_mul(batch))?,
            take(what, &mut self.scales, Gradients::scales_len(rows).saturating_mul(batch))?,
        ))
    }

    /// Bytes on the heap.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<i16>() + self.scales.capacity() * size_of::<f32>()
    }
}
