//! The loops of the 8x8 GEMV over rows and columns.
//!
//! ```text
//! for 4 Q rows:
//!     sums[2][4 Q] = 0                                      even groups, odd groups
//!     for 32 spans of columns:
//!         absmax = of the groups of these rows              a part of the matrix, or restored on the stack
//!         for each span:                                    the step `add_quads`
//!             for each row: products = decode(packed[row]) . x
//!             sums += f32(products of each group) * (absmax * scale)
//!     out = (sums[0] + sums[1]) * WEIGHT_STEP_8X8
//! ```

use super::product_16x4::{AHEAD, padded};
use super::steps::Steps;
use super::steps_8x8::{Quad, QuadAbsmax, QuadSums, Steps8x8};
use crate::absmax::Absmax;
use crate::activations::Activations8x8;
use crate::format::BlockSize;
use crate::isa::scalar_8x8::result;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Spans of a tile, whose absmax wait on the stack where they have to be restored.
const TILE: usize = 32;

/// Packed bytes and first group of some rows.
type Rows<'a, const Q: usize> = [[(&'a [u8], usize); 4]; Q];

/// The 8x8 product of a matrix of whole groups.
#[inline(always)]
pub(in crate::isa) fn gemv<S: Steps8x8>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    if S::QUADS == 2 {
        gemv_quads::<S, 2>(steps, matrix, activations, out);
    } else {
        gemv_quads::<S, 1>(steps, matrix, activations, out);
    }
}

#[inline(always)]
fn gemv_quads<S: Steps8x8, const Q: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    for (tile, out) in out.chunks_mut(4 * Q).enumerate() {
        let (first, last) = (4 * Q * tile, 4 * Q * tile + out.len() - 1);
        // Where there are less rows, the last one stands in for those that are missing.
        let rows: Rows<'_, Q> =
            core::array::from_fn(|q| core::array::from_fn(|r| matrix.grouped_row(last.min(first + 4 * q + r))));
        let sums = match matrix.absmax() {
            Absmax::Plain(absmax) if matrix.block_size() == BlockSize::B64 && matrix.is_row_aligned() => {
                blocks_of_64::<S, Q>(steps, matrix, &rows, absmax, activations)
            }
            _ => any_blocks::<S, Q>(steps, matrix, &rows, activations),
        };
        for (out, sums) in out.chunks_mut(4).zip(sums) {
            for (r, out) in out.iter_mut().enumerate() {
                *out = result([sums[r], sums[4 + r]]);
            }
        }
    }
}

/// The sums of rows where every span has one plain absmax.
#[inline(always)]
fn blocks_of_64<S: Steps8x8, const Q: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    absmax: &[f32],
    activations: &Activations8x8<'_>,
) -> [QuadSums; Q] {
    let values = activations.values().as_chunks::<SPAN>().0;
    let scales = activations.scales().as_chunks::<2>().0;
    let mut sums = [[0.0; 8]; Q];
    let packed: [Quad<'_>; Q] = rows.map(|quad| quad.map(|(row, _)| row.as_chunks().0));
    let absmax: [QuadAbsmax<'_, 1>; Q] =
        rows.map(|quad| quad.map(|(_, group)| absmax[group / 2..][..values.len()].as_chunks().0));
    steps.add_quads(packed, values, absmax, scales, ahead::<Q>(matrix), &mut sums);
    sums
}

/// The sums of rows with any blocks.
#[inline(always)]
fn any_blocks<S: Steps8x8, const Q: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    activations: &Activations8x8<'_>,
) -> [QuadSums; Q] {
    let values = activations.values().as_chunks::<SPAN>().0;
    let (scales, half_scale) = activations.scales().as_chunks::<2>();
    let mut sums = [[0.0; 8]; Q];
    for span in (0..scales.len()).step_by(TILE) {
        let end = scales.len().min(span + TILE);
        let absmax = restored(matrix, rows, 2 * span..2 * end);
        let absmax: [QuadAbsmax<'_, 2>; Q] =
            core::array::from_fn(|q| absmax[q].each_ref().map(|row| &row[..end - span]));
        let packed: [Quad<'_>; Q] = rows.map(|quad| quad.map(|(row, _)| &row.as_chunks().0[span..end]));
        steps.add_quads(packed, &values[span..end], absmax, &scales[span..end], ahead::<Q>(matrix), &mut sums);
    }
    if let &[scale] = half_scale {
        // The other half of the span has an absmax and a scale of 0.
        let groups = 2 * scales.len()..2 * scales.len() + 1;
        let absmax = restored(matrix, rows, groups);
        let absmax: [QuadAbsmax<'_, 2>; Q] = core::array::from_fn(|q| absmax[q].each_ref().map(|row| &row[..1]));
        let bytes = rows.map(|quad| quad.map(|(row, _)| [padded(row.as_chunks::<{ SPAN / 2 }>().1)]));
        let packed: [Quad<'_>; Q] = core::array::from_fn(|q| bytes[q].each_ref().map(|bytes| &bytes[..]));
        steps.add_quads(packed, &values[scales.len()..], absmax, &[[scale, 0.0]], ahead::<Q>(matrix), &mut sums);
    }
    sums
}

/// The absmax of some groups of the rows, up to a tile, and 0 after them.
#[inline(always)]
fn restored<const Q: usize>(
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    groups: core::ops::Range<usize>,
) -> [[[[f32; 2]; TILE]; 4]; Q] {
    let mut absmax = [[[[0.0; 2]; TILE]; 4]; Q];
    for (absmax, rows) in absmax.iter_mut().zip(rows) {
        for (absmax, (_, first_group)) in absmax.iter_mut().zip(rows) {
            matrix.fill_absmax_8x8(first_group + groups.start, &mut absmax.as_flattened_mut()[..groups.len()]);
        }
    }
    absmax
}

/// How many bytes it is to the same columns of the next rows.
#[inline(always)]
fn ahead<const Q: usize>(matrix: &Nf4Matrix<'_>) -> usize {
    (4 * Q * matrix.cols() / 2).max(AHEAD)
}
