//! A vector prepared for the 16x4 multiply.

use crate::error::{ShapeError, check_len};
use crate::format::BlockSize;

/// The largest quantized activation: 14 bits with sign, so that eight products with a 16-bit weight fit in an `i32`.
pub const ACTIVATION_MAX: i16 = 8191;

/// A span of 64 columns: what the packed order below permutes, and the row step of the 16x4 multiply.
pub(crate) const SPAN: usize = 64;

/// A batch of vectors, most often one, quantized in groups of 64 columns (32 for block size 32) to `i16` with one f32
/// scale a group.
///
/// Made by [`crate::Kernels::quantize_activations`] or [`crate::Kernels::quantize_activations_batch`] in buffers of the
/// caller; see [`crate::spec`] for the arithmetic. It also keeps the f32 inputs, for matrices whose blocks straddle
/// rows are multiplied in f32.
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

    /// Joins the parts if they fit.
    pub(crate) fn new(
        inputs: &'a [f32],
        cols: usize,
        block_size: BlockSize,
        values: &'a [i16],
        scales: &'a [f32],
    ) -> Result<Self, ShapeError> {
        let batch = inputs.len().checked_div(cols).unwrap_or(0);
        check_len("inputs", batch * cols, inputs.len())?;
        check_len("activation values", batch * Self::values_len(cols, block_size), values.len())?;
        check_len("activation scales", batch * Self::scales_len(cols, block_size), scales.len())?;
        Ok(Self { inputs, cols, values, scales, group: block_size.group() })
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

    /// The quantized value of input `column` of the first vector, or `None` if nothing was quantized or there is no
    /// such column.
    #[must_use]
    pub fn get(&self, column: usize) -> Option<i16> {
        if column >= self.cols || self.values.is_empty() {
            return None;
        }
        let slot = usize::from(SLOTS[column % SPAN]);
        Some(self.values[column / SPAN * SPAN + slot])
    }

    /// `Ok` if these were quantized in the groups that matrices of `block_size` need.
    pub(crate) fn check_group(&self, block_size: BlockSize) -> Result<(), ShapeError> {
        let (expected, got) = (block_size.group(), self.group);
        if got == expected { Ok(()) } else { Err(ShapeError::Group { expected, got }) }
    }

    /// Values in the packed order of [`SLOTS`], padded with zeros to whole spans.
    #[inline(always)]
    pub(crate) fn values(&self) -> &'a [i16] {
        self.values
    }
}

/// The activations of the two columns of a byte of a span, as [`SLOTS`] has them.
#[inline(always)]
pub(crate) fn pair(values: &[i16; SPAN], byte: usize) -> [i16; 2] {
    if cfg!(nf4_dsp) {
        values.as_chunks().0[byte % (SPAN / 2)]
    } else {
        let (even, odd) = (SLOTS[2 * byte % SPAN], SLOTS[(2 * byte + 1) % SPAN]);
        [values[usize::from(even) % SPAN], values[usize::from(odd) % SPAN]]
    }
}

/// Where each column of a span of 64 stands in the buffer of quantized values: the order in which kernels decode 32
/// packed bytes. First come the even columns (high nibbles), then the odd ones (low nibbles); within each, bytes 0-7,
/// 16-23, 8-15, 24-31. That is what two `vpunpck` of the two byte planes leave in 256-bit registers, so AVX2 multiplies
/// without a shuffle; every 128-bit piece holds eight consecutive bytes, which suits WebAssembly.
///
/// On 64-bit Arm each half of the span stands by itself, first every fourth column from the first on, then from the
/// second on, and so on. That is what `trn` of the two byte planes leave. The columns of elements `i` and `i + 4` of
/// such a piece belong to the same lane, so the widening multiplications of both its halves add to the same sums.
///
/// On Arm cores with the DSP extension the columns stay in order: a byte's two weights meet two adjacent activations
/// there.
pub(crate) const SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        let (byte, odd) = (column / 2, column % 2);
        let piece = match byte / 8 {
            0 => 0,
            1 => 2,
            2 => 1,
            _ => 3,
        };
        let slot = if cfg!(nf4_dsp) {
            column
        } else if cfg!(target_arch = "aarch64") {
            column / 32 * 32 + column % 4 * 8 + column % 32 / 4
        } else {
            odd * 32 + piece * 8 + byte % 8
        };
        assert!(slot < SPAN);
        #[allow(clippy::cast_possible_truncation, reason = "slot < 64, asserted above")]
        {
            slots[column] = slot as u8;
        }
        column += 1;
    }
    slots
};
