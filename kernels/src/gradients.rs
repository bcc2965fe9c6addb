//! Gradients prepared for the transposed 16x4 product.

use core::ops::Range;

use crate::error::{ShapeError, check_len};
use crate::spec::ROW_GROUP;

/// The inputs of the transposed 16x4 product: a batch of vectors, often the gradients of outputs, quantized to `i16` with one
/// f32 scale per group of 32 rows.
///
/// [`Kernels::quantize_gradients`] makes it in buffers that the caller provides; see [`crate::spec`] for the arithmetic. The
/// kernels of every instruction set can multiply by it, and matrices of every block size. The inputs are kept too, because
/// matrices whose number of columns is not a multiple of 32 are multiplied in f32.
///
/// [`Kernels::quantize_gradients`]: crate::Kernels::quantize_gradients
#[derive(Debug, Clone, Copy)]
pub struct Gradients<'a> {
    /// `[batch, rows]`.
    inputs: &'a [f32],
    rows: usize,
    /// These vectors of those that were quantized together.
    first: usize,
    batch: usize,
    together: usize,
    /// Group by group those of all vectors, padded with zeros to whole groups.
    values: &'a [i16],
    /// In the same order.
    scales: &'a [f32],
}

impl<'a> Gradients<'a> {
    /// The number of `i16` values per vector of `rows` inputs: `rows` rounded up to a multiple of 32; `usize::MAX`, a length
    /// that no slice has, if rounding up overflows. A batch needs as many for each vector.
    #[must_use]
    pub const fn values_len(rows: usize) -> usize {
        Self::scales_len(rows).saturating_mul(ROW_GROUP)
    }

    /// The number of f32 scales per vector of `rows` inputs: one per group of 32 rows, of which the last may be shorter. A
    /// batch needs as many for each vector.
    #[must_use]
    pub const fn scales_len(rows: usize) -> usize {
        rows.div_ceil(ROW_GROUP)
    }

    /// Joins the parts, if they fit.
    pub(crate) fn new(
        inputs: &'a [f32],
        rows: usize,
        values: &'a [i16],
        scales: &'a [f32],
    ) -> Result<Self, ShapeError> {
        let batch = inputs.len().checked_div(rows).unwrap_or(0);
        check_len("gradients", batch * rows, inputs.len())?;
        check_len("values of gradients", batch.saturating_mul(Self::values_len(rows)), values.len())?;
        check_len("scales of gradients", batch * Self::scales_len(rows), scales.len())?;
        Ok(Self { inputs, rows, first: 0, batch, together: batch, values, scales })
    }

    /// Number of inputs per vector.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of vectors; 0 if they have no inputs.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Some vectors of the batch, for instance to share work among threads.
    ///
    /// # Panics
    /// If `vectors` does not lie in `0..self.batch()`.
    #[must_use]
    pub fn range(&self, vectors: Range<usize>) -> Self {
        let (start, end, batch) = (vectors.start, vectors.end, self.batch);
        assert!(start <= end && end <= batch, "vectors {start}..{end} of a batch of {batch}");
        let inputs = &self.inputs[vectors.start * self.rows..vectors.end * self.rows];
        Self { inputs, first: self.first + vectors.start, batch: vectors.len(), ..*self }
    }

    /// The inputs, `[batch, rows]`.
    #[must_use]
    pub fn inputs(&self) -> &'a [f32] {
        self.inputs
    }

    /// The quantized value of input `row` of vector `vector`, or `None` if there is no such input.
    #[must_use]
    pub fn get(&self, vector: usize, row: usize) -> Option<i16> {
        let (group, place) = (row / ROW_GROUP, row % ROW_GROUP);
        let inside = vector < self.batch && row < self.rows;
        inside.then(|| self.values[(group * self.together + self.first + vector) * ROW_GROUP + place])
    }

    /// The scale of the group of input `row` of vector `vector`, or `None` if there is no such input.
    #[must_use]
    pub fn scale(&self, vector: usize, row: usize) -> Option<f32> {
        let inside = vector < self.batch && row < self.rows;
        inside.then(|| self.scales[row / ROW_GROUP * self.together + self.first + vector])
    }

    /// The values and the scales of the `N` vectors from one on, which must exist, in a group of rows.
    #[inline(always)]
    pub(crate) fn group<const N: usize>(&self, group: usize, first: usize) -> ([&'a [i16; ROW_GROUP]; N], [f32; N]) {
        let start = group * self.together + self.first + first;
        let (values, scales) = (&self.values.as_chunks().0[start..start + N], &self.scales[start..start + N]);
        (core::array::from_fn(|v| &values[v]), core::array::from_fn(|v| scales[v]))
    }
}
