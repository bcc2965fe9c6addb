//! A vector prepared for the 16x4 multiply.

use crate::error::{ShapeError, check_len};
use crate::format::BlockSize;
use crate::spec::SPAN;

/// The largest quantized activation: 14 bits with sign, so that eight products with a 16-bit weight fit in an `i32`.
pub const ACTIVATION_MAX: i16 = 8191;

const _: () = assert!(8 * 32767 * (ACTIVATION_MAX as i64) <= i32::MAX as i64, "a lane's sum of a span is exact");

/// A batch of vectors, most often one, quantized in groups of 64 columns (32 for block size 32) to `i16` with one f32
/// scale a group.
///
/// Made by [`crate::Kernels::quantize_activations`] or [`crate::Kernels::quantize_activations_batch`] in buffers of the
/// caller; see [`crate::spec`] for the arithmetic. The values stand in the order in which the instruction set of those
/// kernels decodes weights, so only the same kernels multiply with them. The f32 inputs are kept too, because matrices
/// whose blocks straddle rows are multiplied in f32.
///
/// If the number of columns is not a multiple of the group, every matrix with so many columns has straddling blocks;
/// then nothing is quantized and both buffers have length 0.
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a> {
    inputs: &'a [f32],
    cols: usize,
    values: &'a [i16],
    scales: &'a [f32],
    group: usize,
    /// Where each column of a span stands in its values.
    slots: &'static [u8; SPAN],
}

impl<'a> Activations<'a> {
    /// `i16` values that a vector of `cols` inputs needs: `cols` rounded up to a multiple of 64, or 0 if it is not a
    /// multiple of the group; `usize::MAX`, which no slice has, if there is no such multiple. A batch needs so many for
    /// each vector.
    #[must_use]
    pub const fn values_len(cols: usize, block_size: BlockSize) -> usize {
        if cols.is_multiple_of(block_size.group()) { cols.div_ceil(SPAN).saturating_mul(SPAN) } else { 0 }
    }

    /// f32 scales that a vector of `cols` inputs needs: one a group, or 0 if `cols` is not a multiple of the group. A
    /// batch needs so many for each vector.
    #[must_use]
    pub const fn scales_len(cols: usize, block_size: BlockSize) -> usize {
        if cols.is_multiple_of(block_size.group()) { cols / block_size.group() } else { 0 }
    }

    /// Joins the parts if they fit. `slots` is the order of the values.
    pub(crate) fn new(
        inputs: &'a [f32],
        cols: usize,
        block_size: BlockSize,
        values: &'a [i16],
        scales: &'a [f32],
        slots: &'static [u8; SPAN],
    ) -> Result<Self, ShapeError> {
        let batch = inputs.len().checked_div(cols).unwrap_or(0);
        check_len("inputs", batch * cols, inputs.len())?;
        check_len("activation values", batch * Self::values_len(cols, block_size), values.len())?;
        check_len("activation scales", batch * Self::scales_len(cols, block_size), scales.len())?;
        Ok(Self { inputs, cols, values, scales, group: block_size.group(), slots })
    }

    /// Number of inputs of a vector.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of vectors; 0 if they have no inputs.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.inputs.len().checked_div(self.cols).unwrap_or(0)
    }

    /// One vector of the batch.
    ///
    /// # Panics
    /// If `index >= self.batch()`.
    #[must_use]
    pub fn vector(&self, index: usize) -> Self {
        let batch = self.batch();
        assert!(index < batch, "vector {index} of a batch of {batch}");
        let (values, scales) = (self.values.len() / batch, self.scales.len() / batch);
        Self {
            inputs: &self.inputs[index * self.cols..][..self.cols],
            values: &self.values[index * values..][..values],
            scales: &self.scales[index * scales..][..scales],
            ..*self
        }
    }

    /// The f32 inputs, `[batch, cols]`.
    #[must_use]
    pub fn inputs(&self) -> &'a [f32] {
        self.inputs
    }

    /// One scale a group, vector by vector; empty if nothing was quantized.
    #[must_use]
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// Columns a scale.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// The quantized value of input `column` of vector `vector`, or `None` if nothing was quantized or there is no such
    /// input.
    #[must_use]
    pub fn get(&self, vector: usize, column: usize) -> Option<i16> {
        if column >= self.cols || vector >= self.batch() || self.values.is_empty() {
            return None;
        }
        let values = self.values.len() / self.batch();
        let slot = usize::from(self.slots[column % SPAN]);
        Some(self.values[vector * values + column / SPAN * SPAN + slot])
    }

    /// `Ok` if these were quantized by kernels whose table has the order `slots`.
    pub(crate) fn check_order(&self, slots: &'static [u8; SPAN]) -> Result<(), ShapeError> {
        if core::ptr::eq(self.slots, slots) { Ok(()) } else { Err(ShapeError::Order) }
    }

    /// `Ok` if these were quantized in the groups that matrices of `block_size` need.
    pub(crate) fn check_group(&self, block_size: BlockSize) -> Result<(), ShapeError> {
        let (expected, got) = (block_size.group(), self.group);
        if got == expected { Ok(()) } else { Err(ShapeError::Group { expected, got }) }
    }

    /// Values in the order of the kernels that made them, padded with zeros to whole spans.
    #[inline(always)]
    pub(crate) fn values(&self) -> &'a [i16] {
        self.values
    }
}
