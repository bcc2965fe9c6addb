//! Vectors prepared for the products with integers: 16x4 and 8x8.

use crate::error::{ShapeError, check_len};
use crate::float::Float;
use crate::format::BlockSize;
use crate::spec::{GROUP_8X8, SPAN};

/// The inputs of the 16x4 product: a batch of vectors, often just one, quantized to `i16` with one f32 scale per group of 64
/// columns (32 for block size 32).
///
/// [`Kernels::quantize_activations`] and [`Kernels::quantize_activations_batch`] make it in buffers that the caller
/// provides; see [`crate::spec`] for the arithmetic. The values are in the order in which the instruction set of these
/// kernels decodes weights, so only the same kernels can multiply by them. The inputs, of type `T`, are kept too,
/// because matrices whose blocks straddle rows are multiplied in f32.
///
/// If the number of columns is not a multiple of the group, then blocks straddle rows in every such matrix; nothing is
/// quantized, and both buffers have length 0.
///
/// [`Kernels::quantize_activations`]: crate::Kernels::quantize_activations
/// [`Kernels::quantize_activations_batch`]: crate::Kernels::quantize_activations_batch
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a, T = f32> {
    vectors: Vectors<'a, T, i16>,
    group: usize,
}

impl Activations<'_> {
    /// The number of `i16` values per vector of `cols` inputs: `cols` rounded up to a multiple of 64, or 0 if it is not a
    /// multiple of the group; `usize::MAX`, a length that no slice has, if rounding up overflows. A batch needs as many for
    /// each vector.
    #[must_use]
    pub const fn values_len(cols: usize, block_size: BlockSize) -> usize {
        values_len(cols, block_size.activation_group())
    }

    /// The number of f32 scales per vector of `cols` inputs: one per group, or 0 if `cols` is not a multiple of the group. A
    /// batch needs as many for each vector.
    #[must_use]
    pub const fn scales_len(cols: usize, block_size: BlockSize) -> usize {
        scales_len(cols, block_size.activation_group())
    }
}

impl<'a, T: Float> Activations<'a, T> {
    /// Joins the parts, if they fit. `slots` is the order of the values.
    pub(crate) fn new(
        inputs: &'a [T],
        cols: usize,
        block_size: BlockSize,
        values: &'a [i16],
        scales: &'a [f32],
        slots: &'static [u8; SPAN],
    ) -> Result<Self, ShapeError> {
        let group = block_size.activation_group();
        Ok(Self { vectors: Vectors::new(inputs, cols, group, values, scales, slots)?, group })
    }

    /// Number of inputs per vector.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.vectors.cols
    }

    /// Number of vectors; 0 if they have no inputs.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.vectors.batch
    }

    /// One vector of the batch.
    ///
    /// # Panics
    /// If `index >= self.batch()`.
    #[must_use]
    pub fn vector(&self, index: usize) -> Self {
        Self { vectors: self.vectors.vector(index), ..*self }
    }

    /// The inputs, `[batch, cols]`.
    #[must_use]
    pub fn inputs(&self) -> &'a [T] {
        self.vectors.inputs
    }

    /// One scale per group, vector by vector; empty if nothing was quantized.
    #[must_use]
    pub fn scales(&self) -> &'a [f32] {
        self.vectors.scales
    }

    /// Number of columns per scale.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// The quantized value of input `column` of vector `vector`, or `None` if nothing was quantized or there is no such
    /// input.
    #[must_use]
    pub fn get(&self, vector: usize, column: usize) -> Option<i16> {
        self.vectors.get(vector, column)
    }

    /// `Ok` if these were quantized by kernels whose table has the order `slots`.
    pub(crate) fn check_order(&self, slots: &'static [u8; SPAN]) -> Result<(), ShapeError> {
        self.vectors.check_order(slots)
    }

    /// The quantized values alone, without inputs: what the functions of an instruction set take, so that they exist once
    /// for all types.
    pub(crate) fn quantized(&self) -> Activations<'a> {
        Activations { vectors: self.vectors.quantized(), group: self.group }
    }

    /// `Ok` if these were quantized in the groups that matrices of `block_size` need.
    pub(crate) fn check_group(&self, block_size: BlockSize) -> Result<(), ShapeError> {
        let (expected, got) = (block_size.activation_group(), self.group);
        if got == expected { Ok(()) } else { Err(ShapeError::Group { expected, got }) }
    }

    /// Values in the order of the kernels that made them, padded with zeros to whole spans.
    #[inline(always)]
    pub(crate) fn values(&self) -> &'a [i16] {
        self.vectors.values
    }
}

/// The inputs of the 8x8 product: a batch of vectors, often just one, quantized to `i8` with one f32 scale per group of 32
/// columns, for matrices of any block size.
///
/// [`Kernels::quantize_activations_8x8`] and [`Kernels::quantize_activations_8x8_batch`] make it in buffers that the caller
/// provides; see [`crate::spec`] for the arithmetic. The values are in the order in which the instruction
/// set of these kernels decodes weights, so only the same kernels can multiply by them.
///
/// If the number of columns is not a multiple of 32, the product is computed in f32 from the inputs, which are kept for
/// that; nothing is quantized, and both buffers have length 0.
///
/// [`Kernels::quantize_activations_8x8`]: crate::Kernels::quantize_activations_8x8
/// [`Kernels::quantize_activations_8x8_batch`]: crate::Kernels::quantize_activations_8x8_batch
#[derive(Debug, Clone, Copy)]
pub struct Activations8x8<'a, T = f32> {
    vectors: Vectors<'a, T, i8>,
}

impl Activations8x8<'_> {
    /// The number of `i8` values per vector of `cols` inputs: `cols` rounded up to a multiple of 64, or 0 if it is not a
    /// multiple of 32; `usize::MAX`, a length that no slice has, if rounding up overflows. A batch needs as many for each
    /// vector.
    #[must_use]
    pub const fn values_len(cols: usize) -> usize {
        values_len(cols, GROUP_8X8)
    }

    /// The number of f32 scales per vector of `cols` inputs: one per 32, or 0 if `cols` is not a multiple of 32. A batch
    /// needs as many for each vector.
    #[must_use]
    pub const fn scales_len(cols: usize) -> usize {
        scales_len(cols, GROUP_8X8)
    }
}

impl<'a, T: Float> Activations8x8<'a, T> {
    /// Joins the parts, if they fit. `slots` is the order of the values.
    pub(crate) fn new(
        inputs: &'a [T],
        cols: usize,
        values: &'a [i8],
        scales: &'a [f32],
        slots: &'static [u8; SPAN],
    ) -> Result<Self, ShapeError> {
        Ok(Self { vectors: Vectors::new(inputs, cols, GROUP_8X8, values, scales, slots)? })
    }

    /// Number of inputs per vector.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.vectors.cols
    }

    /// Number of vectors; 0 if they have no inputs.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.vectors.batch
    }

    /// One vector of the batch.
    ///
    /// # Panics
    /// If `index >= self.batch()`.
    #[must_use]
    pub fn vector(&self, index: usize) -> Self {
        Self { vectors: self.vectors.vector(index) }
    }

    /// The inputs, `[batch, cols]`.
    #[must_use]
    pub fn inputs(&self) -> &'a [T] {
        self.vectors.inputs
    }

    /// One scale per group of 32 columns, vector by vector; empty if nothing was quantized.
    #[must_use]
    pub fn scales(&self) -> &'a [f32] {
        self.vectors.scales
    }

    /// The quantized value of input `column` of vector `vector`, or `None` if nothing was quantized or there is no such
    /// input.
    #[must_use]
    pub fn get(&self, vector: usize, column: usize) -> Option<i8> {
        self.vectors.get(vector, column)
    }

    /// The quantized values alone, as in [`Activations::quantized`].
    pub(crate) fn quantized(&self) -> Activations8x8<'a> {
        Activations8x8 { vectors: self.vectors.quantized() }
    }

    /// `Ok` if these were quantized by kernels whose table has the order `slots`.
    pub(crate) fn check_order(&self, slots: &'static [u8; SPAN]) -> Result<(), ShapeError> {
        self.vectors.check_order(slots)
    }

    /// Values in the order of the kernels that made them, padded with zeros to whole spans.
    #[inline(always)]
    pub(crate) fn values(&self) -> &'a [i8] {
        self.vectors.values
    }
}

/// Number of values of a vector of `cols` inputs that is quantized in groups: whole spans, or none.
const fn values_len(cols: usize, group: usize) -> usize {
    if cols.is_multiple_of(group) { cols.div_ceil(SPAN).saturating_mul(SPAN) } else { 0 }
}

/// Number of scales of a vector of `cols` inputs that is quantized in groups.
const fn scales_len(cols: usize, group: usize) -> usize {
    if cols.is_multiple_of(group) { cols / group } else { 0 }
}

/// The activations of both products: inputs of type `T`, and the values of type `V` and the scales that were made from them.
#[derive(Debug, Clone, Copy)]
struct Vectors<'a, T, V> {
    /// `[batch, cols]`, or empty for the functions of an instruction set.
    inputs: &'a [T],
    batch: usize,
    cols: usize,
    values: &'a [V],
    scales: &'a [f32],
    /// The position of each column of a span in its values.
    slots: &'static [u8; SPAN],
}

impl<'a, T: Copy, V: Copy> Vectors<'a, T, V> {
    fn new(
        inputs: &'a [T],
        cols: usize,
        group: usize,
        values: &'a [V],
        scales: &'a [f32],
        slots: &'static [u8; SPAN],
    ) -> Result<Self, ShapeError> {
        let batch = inputs.len().checked_div(cols).unwrap_or(0);
        check_len("inputs", batch * cols, inputs.len())?;
        check_len("activation values", batch * values_len(cols, group), values.len())?;
        check_len("activation scales", batch * scales_len(cols, group), scales.len())?;
        Ok(Self { inputs, batch, cols, values, scales, slots })
    }

    fn quantized(&self) -> Vectors<'a, f32, V> {
        let Self { batch, cols, values, scales, slots, .. } = *self;
        Vectors { inputs: &[], batch, cols, values, scales, slots }
    }

    fn vector(&self, index: usize) -> Self {
        let batch = self.batch;
        assert!(index < batch, "vector {index} of a batch of {batch}");
        let (inputs, values, scales) =
            (self.inputs.len() / batch, self.values.len() / batch, self.scales.len() / batch);
        Self {
            inputs: &self.inputs[index * inputs..][..inputs],
            batch: 1,
            values: &self.values[index * values..][..values],
            scales: &self.scales[index * scales..][..scales],
            ..*self
        }
    }

    fn get(&self, vector: usize, column: usize) -> Option<V> {
        if column >= self.cols || vector >= self.batch || self.values.is_empty() {
            return None;
        }
        let values = self.values.len() / self.batch;
        let slot = usize::from(self.slots[column % SPAN]);
        Some(self.values[vector * values + column / SPAN * SPAN + slot])
    }

    fn check_order(&self, slots: &'static [u8; SPAN]) -> Result<(), ShapeError> {
        if core::ptr::eq(self.slots, slots) { Ok(()) } else { Err(ShapeError::Order) }
    }
}
