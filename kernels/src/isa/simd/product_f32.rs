//! The loops of the f32 products over rows, panels of columns and vectors.

use super::product_16x4::{AHEAD, padded};
use super::steps::{Steps, Widen};
use super::steps_f32::{DECODED_SPANS, DecodedRow, StepsF32};
use crate::float::Float;
use crate::format::canonical;
use crate::isa::scalar::{product_f32, product_transposed};
use crate::matrix::Nf4Matrix;
use crate::spec::{self, SPAN};

/// Spans that share one look at the scales. No more than eight, so that decoding nested absmax hides behind the vector work
/// of the spans before.
const STRIDE: usize = 8;

/// The f32 product.
#[inline(always)]
pub(in crate::isa) fn gemv_f32<S: StepsF32 + Widen<T>, T: Float>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[T],
    out: &mut [f32],
) {
    if !matrix.has_whole_groups() {
        return product_f32::gemv_f32(matrix, inputs, out);
    }
    out.fill(0.0);
    let mut panel = [[0.0; SPAN]; spec::PANEL / SPAN];
    for (p, inputs) in inputs.chunks(spec::PANEL).enumerate() {
        arrange(steps, inputs, &mut panel);
        let panel = &panel[..inputs.len().div_ceil(SPAN)];
        if has_whole_spans(matrix) {
            gemv_panel::<S, 1, STRIDE>(steps, matrix, p, inputs.len(), panel, out);
        } else {
            gemv_panel::<S, 2, { 2 * STRIDE }>(steps, matrix, p, inputs.len(), panel, out);
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Whether each span of a row lies in one block. In other rows of whole groups each half does.
#[inline(always)]
fn has_whole_spans(matrix: &Nf4Matrix<'_>) -> bool {
    matrix.is_row_aligned() && matrix.block_size().activation_group() == SPAN
}

/// Puts inputs into order as f32, span by span, with zeros after the last.
#[inline(always)]
fn arrange<S: StepsF32 + Widen<T>, T: Float>(steps: &Steps<S>, inputs: &[T], panel: &mut [[f32; SPAN]]) {
    let (spans, rest) = inputs.as_chunks();
    for (inputs, panel) in spans.iter().zip(&mut *panel) {
        arrange_span(steps, inputs, panel);
    }
    if let ([_, ..], Some(panel)) = (rest, panel.get_mut(spans.len())) {
        let mut padded = [T::from_f32(0.0); SPAN];
        padded[..rest.len()].copy_from_slice(rest);
        arrange_span(steps, &padded, panel);
    }
}

/// Puts the inputs of a span into order as f32.
#[inline(always)]
fn arrange_span<S: StepsF32 + Widen<T>, T: Float>(steps: &Steps<S>, inputs: &[T; SPAN], out: &mut [f32; SPAN]) {
    if let Some(inputs) = T::as_f32(inputs).and_then(|inputs| inputs.first_chunk()) {
        return steps.arrange(inputs, out);
    }
    let mut wide = [0.0; SPAN];
    for (x, wide) in inputs.as_chunks().0.iter().zip(wide.as_chunks_mut().0) {
        steps.store(wide, steps.widen(x));
    }
    steps.arrange(&wide, out);
}

/// Adds the product of panel `p` of a matrix, `cols` columns, with `GROUPS` blocks in a span of 64 columns at
/// most; `SCALES` is `GROUPS * STRIDE`.
#[inline(always)]
fn gemv_panel<S: StepsF32, const GROUPS: usize, const SCALES: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    p: usize,
    cols: usize,
    inputs: &[[f32; SPAN]],
    out: &mut [f32],
) {
    // What comes next: the part of the next row, if a row has several.
    let ahead = (matrix.cols() / 2).max(AHEAD);
    let first_group = p * (spec::PANEL / SPAN * GROUPS);
    // Cut where the packed bytes are: a last half span is padded here, and may fill a stride that those do not.
    let (inputs, inputs_rest) = inputs.split_at(cols / (STRIDE * SPAN) * STRIDE);
    let (inputs, _) = inputs.as_chunks::<STRIDE>();
    for (row, out) in out.iter_mut().enumerate() {
        let (packed, row_group) = matrix.span_row::<GROUPS>(row);
        let (packed, half) = packed[p * spec::PANEL / 2..][..cols / 2].as_chunks::<{ SPAN / 2 }>();
        let (packed, packed_rest) = packed.as_chunks::<STRIDE>();
        let mut lanes = steps.load(&[0.0; 8]);
        let mut group = first_group;
        for (packed, inputs) in packed.iter().zip(inputs) {
            let absmax = matrix.span_absmax::<GROUPS, SCALES>(row_group + group);
            lanes = add_spans::<S, GROUPS>(steps, lanes, packed, inputs, &absmax, ahead);
            group += SCALES;
        }
        if !inputs_rest.is_empty() {
            let mut absmax = [0.0; SCALES];
            let groups = (cols - cols / (STRIDE * SPAN) * (STRIDE * SPAN)) / (SPAN / GROUPS);
            matrix.span_absmax_rest::<GROUPS>(row_group + group, &mut absmax[..groups]);
            lanes = add_spans::<S, GROUPS>(steps, lanes, packed_rest, inputs_rest, &absmax, ahead);
            if let (false, Some(inputs)) = (half.is_empty(), inputs_rest.last()) {
                // The other half of the span has inputs and an absmax of 0, which change no lane.
                let absmax = &[absmax[groups - 1], 0.0];
                lanes =
                    add_spans::<S, GROUPS>(steps, lanes, &[padded(half)], core::slice::from_ref(inputs), absmax, ahead);
            }
        }
        *out += steps.add_lanes(lanes);
    }
}

/// Adds spans to the lanes, and prefetches the bytes that are `ahead` bytes further.
#[inline(always)]
fn add_spans<S: StepsF32, const GROUPS: usize>(
    steps: &Steps<S>,
    mut lanes: S::Lanes,
    packed: &[[u8; SPAN / 2]],
    inputs: &[[f32; SPAN]],
    absmax: &[f32],
    ahead: usize,
) -> S::Lanes {
    for ((packed, inputs), absmax) in packed.iter().zip(inputs).zip(absmax.as_chunks::<GROUPS>().0) {
        steps.prefetch(packed, ahead);
        lanes = steps.add_span_f32(lanes, packed, inputs, absmax);
    }
    lanes
}

/// Rows of a tile of a batch: 16 KB of decoded weights.
const ROWS: usize = 8;
/// Columns of a tile, a part of a panel.
const COLUMNS: usize = DECODED_SPANS * SPAN;
/// Vectors whose lanes are held at once.
const VECTORS: usize = 64;

/// The f32 product of a batch: the weights of a tile are decoded once for all vectors, whose inputs are arranged again for
/// each tile of rows.
#[inline(always)]
pub(in crate::isa) fn gemm_f32<S: StepsF32 + Widen<T>, T: Float>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[T],
    out: &mut [f32],
) {
    if !matrix.has_whole_groups() {
        product_f32::gemm_f32(matrix, inputs, out);
    } else if has_whole_spans(matrix) {
        gemm_groups::<S, T, 1>(steps, matrix, inputs, out);
    } else {
        gemm_groups::<S, T, 2>(steps, matrix, inputs, out);
    }
}

/// The product with `GROUPS` blocks in a span of 64 columns at most.
#[inline(always)]
fn gemm_groups<S: StepsF32 + Widen<T>, T: Float, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[T],
    out: &mut [f32],
) {
    let (cols, batch) = (matrix.cols(), inputs.len() / matrix.cols());
    let mut rows: [DecodedRow<GROUPS>; ROWS] = core::array::from_fn(|_| DecodedRow {
        weights: [[0.0; SPAN]; DECODED_SPANS],
        absmax: [[0.0; GROUPS]; DECODED_SPANS],
    });
    let mut lanes = [[[0.0; 8]; ROWS]; VECTORS];
    let mut arranged = [[0.0; SPAN]; DECODED_SPANS];
    out.fill(0.0);
    for first in (0..batch).step_by(VECTORS) {
        let vectors = VECTORS.min(batch - first);
        let inputs = &inputs[first * cols..][..vectors * cols];
        for (tile, out) in out.chunks_mut(ROWS.saturating_mul(batch)).enumerate() {
            let count = out.len() / batch;
            for column in (0..cols).step_by(COLUMNS) {
                let width = COLUMNS.min(cols - column);
                for (r, row) in rows[..count].iter_mut().enumerate() {
                    decode_row(steps, matrix, tile * ROWS + r, column, width, row);
                }
                for (inputs, lanes) in inputs.chunks(cols).zip(&mut lanes) {
                    arrange(steps, &inputs[column..column + width], &mut arranged);
                    if column.is_multiple_of(spec::PANEL) {
                        lanes.fill([0.0; 8]);
                    }
                    let x = &arranged[..width.div_ceil(SPAN)];
                    if S::ROWS == 4 {
                        add_rows::<S, GROUPS, 4>(steps, &rows[..count], x, &mut lanes[..count]);
                    } else {
                        add_rows::<S, GROUPS, 2>(steps, &rows[..count], x, &mut lanes[..count]);
                    }
                }
                let end = column + width;
                if end == cols || end.is_multiple_of(spec::PANEL) {
                    for (r, out) in out.chunks_mut(batch).enumerate() {
                        for (out, lanes) in out[first..first + vectors].iter_mut().zip(&lanes) {
                            *out += steps.add_lanes(steps.load(&lanes[r]));
                        }
                    }
                }
            }
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Decodes `width` columns from `column` on of a row of the matrix.
#[inline(always)]
fn decode_row<S: StepsF32, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    row: usize,
    column: usize,
    width: usize,
    out: &mut DecodedRow<GROUPS>,
) {
    let (packed, row_group) = matrix.span_row::<GROUPS>(row);
    let (absmax, rest) = out.absmax.as_flattened_mut().split_at_mut(width / (SPAN / GROUPS));
    matrix.span_absmax_rest::<GROUPS>(row_group + column / (SPAN / GROUPS), absmax);
    // A group that is not there has inputs of zero.
    rest.fill(0.0);
    let (spans, half) = packed[column / 2..][..width / 2].as_chunks();
    for (packed, weights) in spans.iter().zip(&mut out.weights) {
        steps.decode_f32(packed, weights);
    }
    if let (false, Some(weights)) = (half.is_empty(), out.weights.get_mut(spans.len())) {
        steps.decode_f32(&padded(half), weights);
    }
}

/// Adds the products of decoded rows, `R` at a time, and a vector to their lanes.
#[inline(always)]
fn add_rows<S: StepsF32, const GROUPS: usize, const R: usize>(
    steps: &Steps<S>,
    rows: &[DecodedRow<GROUPS>],
    inputs: &[[f32; SPAN]],
    lanes: &mut [[f32; 8]],
) {
    let (several, rest) = rows.as_chunks::<R>();
    let (lanes, lanes_rest) = lanes.as_chunks_mut::<R>();
    for (rows, lanes) in several.iter().zip(lanes) {
        steps.add_rows(rows, inputs, lanes);
    }
    for (row, lanes) in rest.iter().zip(lanes_rest) {
        steps.add_rows(core::array::from_ref(row), inputs, core::array::from_mut(lanes));
    }
}

/// The f32 product with the transposed matrix. Four rows at a time are decoded, multiplied by the product of absmax and
/// input, and added to the sums of their columns, which stay on the stack in order for a panel of columns and a chunk of rows.
#[inline(always)]
pub(in crate::isa) fn gemv_transposed_f32<S: StepsF32>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[f32],
    out: &mut [f32],
) {
    if !matrix.has_whole_groups() {
        product_transposed::gemv_transposed_f32(matrix, inputs, out);
    } else if has_whole_spans(matrix) {
        transposed_groups::<S, 1, STRIDE>(steps, matrix, inputs, out);
    } else {
        transposed_groups::<S, 2, { 2 * STRIDE }>(steps, matrix, inputs, out);
    }
}

/// The product with `GROUPS` blocks in a span of 64 columns at most; `SCALES` is `GROUPS * STRIDE`.
#[inline(always)]
fn transposed_groups<S: StepsF32, const GROUPS: usize, const SCALES: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[f32],
    out: &mut [f32],
) {
    let mut panel = [[0.0; SPAN]; spec::PANEL / SPAN];
    for (p, out) in out.chunks_mut(spec::PANEL).enumerate() {
        let panel = &mut panel[..out.len().div_ceil(SPAN)];
        out.fill(0.0);
        for (chunk, inputs) in inputs.chunks(spec::ROW_CHUNK).enumerate() {
            panel.fill([0.0; SPAN]);
            for (four, inputs) in inputs.chunks(4).enumerate() {
                let row = chunk * spec::ROW_CHUNK + four * 4;
                // A row that is not there is the first once more, with factors of zero.
                let rows =
                    [0, 1, 2, 3].map(|i| matrix.span_row::<GROUPS>(if i < inputs.len() { row + i } else { row }));
                for (stride, sums) in panel.chunks_mut(STRIDE).enumerate() {
                    let column = p * spec::PANEL + stride * STRIDE * SPAN;
                    let group = column / (SPAN / GROUPS);
                    let groups = SCALES.min(matrix.cols() / (SPAN / GROUPS) - group);
                    let mut factors = [[0.0; SCALES]; 4];
                    for (((_, row_group), factors), x) in rows.iter().zip(&mut factors).zip(inputs) {
                        if groups == SCALES {
                            *factors = matrix.span_absmax::<GROUPS, SCALES>(row_group + group);
                        } else {
                            matrix.span_absmax_rest::<GROUPS>(row_group + group, &mut factors[..groups]);
                        }
                        factors.iter_mut().take(groups).for_each(|f| *f *= x);
                    }
                    let packed = rows.map(|(packed, _)| &packed[column / 2..]);
                    // The same columns of the next four rows.
                    for line in (0..STRIDE * SPAN / 2).step_by(64) {
                        packed.iter().for_each(|packed| steps.prefetch(packed, 4 * (matrix.cols() / 2) + line));
                    }
                    add_fours::<S, GROUPS, SCALES>(steps, packed, &factors, sums);
                }
            }
            for (sums, out) in panel.iter().zip(out.chunks_mut(SPAN)) {
                for (out, slot) in out.iter_mut().zip(S::SLOTS) {
                    *out += sums[usize::from(slot)];
                }
            }
        }
        out.iter_mut().for_each(|y| *y = canonical(*y));
    }
}

/// Adds four rows, times their factors, to the sums of some spans.
#[inline(always)]
fn add_fours<S: StepsF32, const GROUPS: usize, const SCALES: usize>(
    steps: &Steps<S>,
    packed: [&[u8]; 4],
    factors: &[[f32; SCALES]; 4],
    sums: &mut [[f32; SPAN]],
) {
    for (s, sums) in sums.iter_mut().enumerate() {
        let factors = factors.each_ref().map(|factors| &factors.as_chunks::<GROUPS>().0[s]);
        let bytes = packed.map(|packed| &packed[s * SPAN / 2..]);
        if let [Some(a), Some(b), Some(c), Some(d)] = bytes.map(|bytes| bytes.first_chunk()) {
            steps.add_four([a, b, c, d], factors, sums);
        } else {
            steps.add_four(bytes.map(padded).each_ref(), factors, sums);
        }
    }
}
