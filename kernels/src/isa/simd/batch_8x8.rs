//! The loops of the 8x8 GEMM over vectors, rows and panels of decoded weights.
//!
//! ```text
//! for 128 vectors:
//!     for 128 rows, or more where there are less vectors:
//!         sums[128][2][128] = 0                             even groups, odd groups
//!         for 8 spans of columns:
//!             vectors = these columns of the 128 vectors    brought together, in the order of use
//!             for 32 rows:
//!                 panel = decode(32 rows, 8 spans)          once for all vectors
//!                 for 8 vectors:                            the step `add_panel`
//!                     for each group:
//!                         products = panel . x              rows in lanes, four columns at a time
//!                         sums += f32(products) * (absmax * scale)
//! ```

use core::ops::Range;

use super::product_8x8;
use super::product_16x4::padded;
use super::steps::Steps;
use super::steps_8x8::{PanelSpan, ROWS, SPANS, Steps8x8, Sums, VECTORS, VectorSpan};
use crate::absmax::Absmax;
use crate::activations::Activations8x8;
use crate::format::{BlockSize, get_range};
use crate::isa::scalar::product_8x8::result;
use crate::matrix::Nf4Matrix;
use crate::spec::{GROUP_8X8, SPAN};

/// Times [`VECTORS`] that share a panel: 80 KB of activations. With half as many, a batch of 128 was 0.95 times as fast on
/// Zen 4 with AVX-512, because panels are decoded twice as often.
const CHUNKS: usize = 16;

/// Sums of panels that share activations: 128 KB wait on the stack from one panel of columns to the next. Of a small batch
/// there are more panels.
const SUMS: usize = 4 * CHUNKS;

/// The 8x8 product of a matrix of whole groups and a batch.
#[inline(always)]
pub(in crate::isa) fn gemm<S: Steps8x8>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    if activations.batch() <= S::FEW {
        return product_8x8::multiply(steps, matrix, activations, out);
    }
    multiply_panels(steps, matrix, activations, out);
}

#[inline(always)]
fn multiply_panels<S: Steps8x8>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    let (batch, spans) = (activations.batch(), matrix.cols().div_ceil(SPAN));
    let mut panel = [PanelSpan { weights: S::EMPTY, absmax: [[0.0; ROWS]; 2] }; SPANS];
    let empty = VectorSpan { values: [[0; SPAN]; VECTORS], scales: [[0.0; VECTORS]; 2], starts: [[0; VECTORS]; 2] };
    let mut pieces = [[empty; SPANS]; CHUNKS];
    let mut sums = [[[[0.0; ROWS]; 2]; VECTORS]; SUMS];
    for first in (0..batch).step_by(CHUNKS * VECTORS) {
        let vectors = first..batch.min(first + CHUNKS * VECTORS);
        let chunks = vectors.len().div_ceil(VECTORS);
        let rows_of_tile = SUMS / chunks * ROWS;
        for (tile, out) in out.chunks_mut(rows_of_tile * batch).enumerate() {
            let rows = tile * rows_of_tile..tile * rows_of_tile + out.len() / batch;
            sums.iter_mut()
                .take(rows.len().div_ceil(ROWS) * chunks)
                .for_each(|sums| *sums = [[[0.0; ROWS]; 2]; VECTORS]);
            for span in (0..spans).step_by(SPANS) {
                let columns = span..spans.min(span + SPANS);
                for (first, piece) in vectors.clone().step_by(VECTORS).zip(&mut pieces) {
                    fill_piece(steps, activations, first..vectors.end, columns.clone(), piece);
                }
                for (first_row, sums) in rows.clone().step_by(ROWS).zip(sums.chunks_exact_mut(chunks)) {
                    // Where there are less rows, the last one stands in for those that are missing.
                    let rows = core::array::from_fn(|row| matrix.grouped_row((rows.end - 1).min(first_row + row)));
                    fill_panel(steps, matrix, &rows, columns.clone(), &mut panel);
                    let panel = &panel[..columns.len()];
                    for ((first, piece), sums) in vectors.clone().step_by(VECTORS).zip(&pieces).zip(sums) {
                        add_panel(steps, panel, vectors.end - first, &piece[..columns.len()], sums);
                    }
                }
            }
            for (out, sums) in out.chunks_mut(ROWS * batch).zip(sums.chunks_exact(chunks)) {
                for (row, out) in out.chunks_exact_mut(batch).enumerate() {
                    for (out, [even, odd]) in out[vectors.clone()].iter_mut().zip(sums.as_flattened()) {
                        *out = result([even[row], odd[row]]);
                    }
                }
            }
        }
    }
}

/// Adds the products of a panel and the vectors of a piece, of which there are `left` or eight.
#[inline(always)]
fn add_panel<S: Steps8x8>(
    steps: &Steps<S>,
    panel: &[PanelSpan<S::Weights>],
    left: usize,
    piece: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    match left {
        5.. => steps.add_panel_8x8::<8>(panel, piece, sums),
        3..=4 => steps.add_panel_8x8::<4>(panel, piece, sums),
        _ => steps.add_panel_8x8::<2>(panel, piece, sums),
    }
}

/// Brings the columns of up to eight vectors together. Where there are less, the last one stands in for those that are
/// missing.
#[inline(always)]
fn fill_piece<S: Steps8x8>(
    steps: &Steps<S>,
    activations: &Activations8x8<'_>,
    vectors: Range<usize>,
    columns: Range<usize>,
    piece: &mut [VectorSpan; SPANS],
) {
    let (spans, groups) = (activations.cols().div_ceil(SPAN), activations.cols() / GROUP_8X8);
    let values = activations.values().as_chunks::<SPAN>().0;
    for n in 0..VECTORS {
        let vector = (vectors.end - 1).min(vectors.start + n);
        let values = &values[vector * spans..][columns.clone()];
        let scales = &activations.scales()[vector * groups..][2 * columns.start..groups.min(2 * columns.end)];
        let (pairs, half) = scales.as_chunks::<2>();
        for (piece, values) in piece.iter_mut().zip(values) {
            piece.values[n] = *values;
        }
        for (piece, scales) in piece.iter_mut().zip(pairs) {
            [piece.scales[0][n], piece.scales[1][n]] = *scales;
        }
        if let &[scale] = half {
            // A group that is not there has a scale of 0.
            [piece[pairs.len()].scales[0][n], piece[pairs.len()].scales[1][n]] = [scale, 0.0];
        }
    }
    for piece in &mut piece[..columns.len()] {
        piece.starts = steps.starts(&piece.values);
    }
}

/// Decodes some spans of the rows of a panel, given by their packed bytes and first groups.
#[inline(always)]
fn fill_panel<S: Steps8x8>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &[(&[u8], usize); ROWS],
    columns: Range<usize>,
    panel: &mut [PanelSpan<S::Weights>; SPANS],
) {
    let whole = columns.start..columns.end.min(matrix.cols() / SPAN);
    // What comes next: the following columns or, at the end of a row, the following rows.
    let next = columns.end * SPAN;
    let ahead = if next < matrix.cols() { SPANS * SPAN / 2 } else { (ROWS * matrix.cols() - columns.start * SPAN) / 2 };
    for (span, panel) in whole.clone().zip(&mut *panel) {
        let mut packed = [&[0; SPAN / 2]; ROWS];
        for (packed, (row, _)) in packed.iter_mut().zip(rows) {
            *packed = &row.as_chunks().0[span];
        }
        steps.decode_rows(packed, ahead, &mut panel.weights);
    }
    let mut groups = 2 * whole.len();
    if columns.end > whole.end {
        let bytes = rows.map(|(packed, _)| padded(packed.as_chunks::<{ SPAN / 2 }>().1));
        steps.decode_rows(bytes.each_ref(), 0, &mut panel[whole.len()].weights);
        groups += 1;
    }
    let blocks = match matrix.absmax() {
        Absmax::Plain(absmax) if matrix.block_size() == BlockSize::B64 && matrix.is_row_aligned() => Some(absmax),
        _ => None,
    };
    for (row, (_, first_group)) in rows.iter().enumerate() {
        let first = first_group + 2 * columns.start;
        // Most often a span is a block.
        if let Some(blocks) =
            blocks.and_then(|blocks| get_range(blocks, first / 2..blocks.len()).first_chunk::<SPANS>())
        {
            for span in 0..SPANS {
                panel[span].absmax[0][row] = blocks[span];
                panel[span].absmax[1][row] = blocks[span];
            }
            continue;
        }
        // A group that is not there has an absmax of 0.
        let mut absmax = [0.0; 2 * SPANS];
        matrix.fill_absmax_8x8(first, &mut absmax[..groups]);
        for span in 0..SPANS {
            panel[span].absmax[0][row] = absmax[2 * span];
            panel[span].absmax[1][row] = absmax[2 * span + 1];
        }
    }
}
