//! The loops of the 16x4 GEMM with many vectors, over panels of decoded weights.
//!
//! ```text
//! for 64 vectors:
//!     for 8 rows:
//!         lanes[64][8] = 0
//!         for 16 spans of columns:
//!             panel = decode(8 rows, 16 spans)              once for all vectors
//!             for each vector:
//!                 factors = absmax * scale                  for the whole panel, before its loop
//!                 sums = lanes[vector]                      8 registers
//!                 for each span:
//!                     x = activations of the span           in registers
//!                     for each row: sums[row] += f32(weights[row] . x) * factors[row]
//!                 lanes[vector] = sums
//! ```
//!
//! The panel and the lanes stay in the nearest cache, the weights are operands from memory, and the lanes of a row are
//! added to in the order of the GEMV, so they have its bits. Factors are made for a whole panel because a register that
//! is stored and at once read back element by element stalls.

use super::product_16x4::{padded, result};
use super::steps::Steps;
use super::steps_16x4::{PANEL_ROWS as ROWS, PANEL_SPANS as SPANS, Panel, PanelLanes, Panels16x4};
use crate::activations::Activations;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Vectors whose lanes wait on the stack from one panel of columns to the next: 16 KB.
const VECTORS: usize = 64;

/// The product with `GROUPS` activation groups in a span.
#[inline(always)]
pub(super) fn gemm<S: Panels16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let (batch, spans, groups) = (activations.batch(), matrix.cols().div_ceil(SPAN), matrix.cols() / (SPAN / GROUPS));
    let values = activations.values().as_chunks::<SPAN>().0;
    let mut panel = Panel { weights: [[[0; SPAN]; ROWS]; SPANS], absmax: [[[0.0; GROUPS]; ROWS]; SPANS] };
    let mut lanes = [[[0.0; 8]; ROWS]; VECTORS];
    for first in (0..batch).step_by(VECTORS) {
        let vectors = VECTORS.min(batch - first);
        let lanes = &mut lanes[..vectors];
        for (tile, out) in out.chunks_mut(ROWS * batch).enumerate() {
            let rows = out.len() / batch;
            lanes.fill([[0.0; 8]; ROWS]);
            for span in (0..spans).step_by(SPANS) {
                let end = spans.min(span + SPANS);
                for row in 0..rows {
                    decode_row(steps, matrix, tile * ROWS + row, span..end, row, &mut panel);
                }
                for (vector, lanes) in (first..).zip(&mut *lanes) {
                    let values = &values[vector * spans..][span..end];
                    let scales = &activations.scales()[vector * groups..][span * GROUPS..groups.min(end * GROUPS)];
                    // The same columns of the next vector.
                    steps.add_panel(&panel, values, scales, spans * size_of::<[i16; SPAN]>(), lanes);
                }
            }
            for (row, out) in out.chunks_mut(batch).enumerate() {
                for (out, lanes) in out[first..].iter_mut().zip(&*lanes) {
                    *out = result(steps, steps.load(&lanes[row]));
                }
            }
        }
    }
}

/// Decodes some spans of a row of the matrix into row `place` of a panel.
#[inline(always)]
fn decode_row<S: Panels16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    row: usize,
    spans: core::ops::Range<usize>,
    place: usize,
    panel: &mut Panel<GROUPS>,
) {
    let (packed, first_block) = matrix.aligned_row(row);
    let columns = spans.start * SPAN..matrix.cols().min(spans.end * SPAN);
    // What comes next: the following columns or, at the end of a row, the following rows.
    let ahead =
        if columns.end < matrix.cols() { SPANS * SPAN / 2 } else { ROWS * matrix.cols() / 2 - columns.start / 2 };
    // A group that is not there has an absmax of 0; its activations are 0 too.
    let mut absmax = [[0.0; GROUPS]; SPANS];
    let groups = columns.len() / (SPAN / GROUPS);
    matrix.group_absmax_rest(first_block, spans.start * GROUPS, &mut absmax.as_flattened_mut()[..groups]);
    let (packed, half) = packed[columns.start / 2..columns.end / 2].as_chunks();
    let mut weights = panel.weights.iter_mut().zip(&mut panel.absmax).zip(absmax);
    for (packed, ((weights, out), absmax)) in packed.iter().zip(&mut weights) {
        steps.prefetch(packed, ahead);
        steps.store_span(&mut weights[place], steps.decode_span(packed));
        out[place] = absmax;
    }
    if let (false, Some(((weights, out), absmax))) = (half.is_empty(), weights.next()) {
        steps.store_span(&mut weights[place], steps.decode_span(&padded(half)));
        out[place] = absmax;
    }
}

/// Adds the products of a panel and the activations of a vector to its lanes: as many spans as `values` has. Prefetches
/// the activations that are `ahead` bytes further.
#[inline(always)]
pub(in crate::isa) fn add_panel<S: Panels16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    panel: &Panel<GROUPS>,
    values: &[[i16; SPAN]],
    scales: &[f32],
    ahead: usize,
    lanes: &mut PanelLanes,
) {
    // A group that is not there has a scale of 0.
    let mut padded = [[0.0; GROUPS]; SPANS];
    padded.as_flattened_mut()[..scales.len()].copy_from_slice(scales);
    let mut factors = [[[0.0; GROUPS]; ROWS]; SPANS];
    for ((factors, absmax), scales) in factors.iter_mut().zip(&panel.absmax).zip(&padded) {
        for (factors, absmax) in factors.iter_mut().zip(absmax) {
            *factors = core::array::from_fn(|group| absmax[group] * scales[group]);
        }
    }
    if S::VECTORS == ROWS {
        add_rows::<S, GROUPS, ROWS>(steps, panel, 0, values, &factors, ahead, lanes);
    } else {
        for (part, lanes) in lanes.as_chunks_mut::<{ ROWS / 2 }>().0.iter_mut().enumerate() {
            add_rows::<S, GROUPS, { ROWS / 2 }>(steps, panel, part * (ROWS / 2), values, &factors, ahead, lanes);
        }
    }
}

/// As [`add_panel`], for `R` rows from `first` on, whose lanes are in registers.
#[inline(always)]
fn add_rows<S: Panels16x4, const GROUPS: usize, const R: usize>(
    steps: &Steps<S>,
    panel: &Panel<GROUPS>,
    first: usize,
    values: &[[i16; SPAN]],
    factors: &[[[f32; GROUPS]; ROWS]; SPANS],
    ahead: usize,
    lanes: &mut [[f32; 8]; R],
) {
    let mut sums = [steps.load(&[0.0; 8]); R];
    for (sum, lanes) in sums.iter_mut().zip(&*lanes) {
        *sum = steps.load(lanes);
    }
    for ((values, weights), factors) in values.iter().zip(&panel.weights).zip(factors) {
        let bytes: &[u8; 2 * SPAN] = bytemuck::must_cast_ref(values);
        steps.prefetch(bytes, ahead);
        steps.prefetch(bytes, ahead + 64);
        let x = steps.load_span(values);
        let rows = weights.as_chunks::<R>().0[first / R].iter().zip(&factors.as_chunks::<R>().0[first / R]);
        for (sum, (weights, factors)) in sums.iter_mut().zip(rows) {
            *sum = steps.add_products(*sum, steps.load_span(weights), x, factors);
        }
    }
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        steps.store(lanes, sum);
    }
}
