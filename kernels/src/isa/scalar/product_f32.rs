//! The f32 product in portable code.

use crate::float::Float;
use crate::format::{CODEBOOK, canonical, get_range};
use crate::matrix::{Nf4Matrix, Segment};
use crate::spec::{self, SPAN};

/// The f32 product of a matrix of any shape.
pub(in crate::isa) fn gemv_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot_f32(matrix, row, inputs);
    }
}

/// The f32 product of a batch, with a matrix of any shape.
pub(in crate::isa) fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(inputs.len() / matrix.cols()).enumerate() {
        for (inputs, out) in inputs.chunks_exact(matrix.cols()).zip(out) {
            *out = dot_f32(matrix, row, inputs);
        }
    }
}

/// The f32 product of a row and a vector.
fn dot_f32<T: Float>(matrix: &Nf4Matrix<'_>, row: usize, inputs: &[T]) -> f32 {
    let mut start = matrix.row_start(row);
    let mut sum = 0.0;
    for panel in inputs.chunks(spec::PANEL) {
        let mut lanes = [0.0; 8];
        for inputs in panel.chunks(SPAN) {
            for segment in matrix.segments(start, start + inputs.len()) {
                add_segment(matrix, &segment, segment.start - start, inputs, &mut lanes);
            }
            start += inputs.len();
        }
        sum += spec::add_lanes(lanes);
    }
    canonical(sum)
}

/// Adds the products of the columns of a span that lie in one block; the first is column `skip` of the span.
fn add_segment<T: Float>(
    matrix: &Nf4Matrix<'_>,
    segment: &Segment<'_>,
    skip: usize,
    inputs: &[T],
    lanes: &mut [f32; 8],
) {
    let mut products = [0.0; SPAN];
    let mut present = [false; 8];
    let columns = skip..skip + segment.len;
    let inputs = get_range(inputs, columns.clone());
    for (i, (x, slot)) in inputs.iter().zip(get_range(&spec::F32_SLOTS, columns)).enumerate() {
        let slot = usize::from(*slot) % SPAN;
        products[slot] = CODEBOOK[matrix.code(segment.start + i)] * x.to_f32();
        present[slot % 8] = true;
    }
    // A lane without a column in this segment must not meet the block's absmax, which may be infinite.
    for ((lane, sum), present) in lanes.iter_mut().zip(spec::add_places(&products)).zip(present) {
        if present {
            *lane += sum * segment.absmax;
        }
    }
}
