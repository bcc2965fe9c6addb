//! The loops of the 8x8 product of a few vectors, over rows, vectors and columns.
//!
//! ```text
//! for 4 Q rows:
//!     for up to 4 vectors:
//!         sums[4][2][4 Q] = 0                               even groups, odd groups
//!         for 32 spans of columns:
//!             absmax = of the groups of these rows          a part of the matrix, or restored on the stack
//!             for each span:                                the step `add_quads`
//!                 for each row: decode(packed[row]), and for each vector: products = weights . x
//!                 sums += f32(products of each group) * (absmax * scale)
//!         out = (sums[0] + sums[1]) * WEIGHT_STEP_8X8
//! ```

use super::product_16x4::{AHEAD, padded};
use super::steps::Steps;
use super::steps_8x8::{Quad, QuadAbsmax, QuadSums, Steps8x8};
use crate::absmax::Absmax;
use crate::activations::Activations8x8;
use crate::format::BlockSize;
use crate::isa::scalar::product_8x8::result;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Spans of a tile, whose absmax wait on the stack where they have to be restored.
const TILE: usize = 32;

/// Packed bytes and first group of some rows.
type Rows<'a, const Q: usize> = [[(&'a [u8], usize); 4]; Q];

/// Vectors whose sums a step keeps in registers.
const VECTORS: usize = 4;

/// The 8x8 product of a matrix of whole groups and a few vectors.
#[inline(always)]
pub(in crate::isa) fn multiply<S: Steps8x8>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    if S::QUADS == 2 {
        multiply_quads::<S, 2>(steps, matrix, activations, out);
    } else {
        multiply_quads::<S, 1>(steps, matrix, activations, out);
    }
}

#[inline(always)]
fn multiply_quads<S: Steps8x8, const Q: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations8x8<'_>,
    out: &mut [f32],
) {
    let batch = activations.batch();
    for (tile, out) in out.chunks_mut(4 * Q * batch).enumerate() {
        let (first, last) = (4 * Q * tile, 4 * Q * tile + out.len() / batch - 1);
        // Where there are less rows, the last one stands in for those that are missing.
        let rows: Rows<'_, Q> =
            core::array::from_fn(|q| core::array::from_fn(|r| matrix.grouped_row(last.min(first + 4 * q + r))));
        for vector in (0..batch).step_by(VECTORS) {
            match batch - vector {
                VECTORS.. if S::FEW > 3 => {
                    multiply_vectors::<S, Q, VECTORS>(steps, matrix, &rows, activations, vector, out)
                }
                3 if S::FEW > 2 => multiply_vectors::<S, Q, 3>(steps, matrix, &rows, activations, vector, out),
                2 if S::FEW > 1 => multiply_vectors::<S, Q, 2>(steps, matrix, &rows, activations, vector, out),
                _ => multiply_vectors::<S, Q, 1>(steps, matrix, &rows, activations, vector, out),
            }
        }
    }
}

/// The products of `Q` times four rows and the `N` vectors from `first` on.
#[inline(always)]
fn multiply_vectors<S: Steps8x8, const Q: usize, const N: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    activations: &Activations8x8<'_>,
    first: usize,
    out: &mut [f32],
) {
    let vectors: [Activations8x8<'_>; N] = core::array::from_fn(|n| activations.vector(first + n));
    let sums = match matrix.absmax() {
        Absmax::Plain(absmax) if matrix.block_size() == BlockSize::B64 && matrix.is_row_aligned() => {
            blocks_of_64::<S, Q, N>(steps, matrix, rows, absmax, &vectors)
        }
        _ => any_blocks::<S, Q, N>(steps, matrix, rows, &vectors),
    };
    for (n, sums) in sums.iter().enumerate() {
        for (row, out) in out.chunks_exact_mut(activations.batch()).enumerate() {
            let sums = &sums[row / 4 % Q];
            out[first + n] = result([sums[row % 4], sums[4 + row % 4]]);
        }
    }
}

/// The sums of rows where every span has one plain absmax.
#[inline(always)]
fn blocks_of_64<S: Steps8x8, const Q: usize, const N: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    absmax: &[f32],
    vectors: &[Activations8x8<'_>; N],
) -> [[QuadSums; Q]; N] {
    let values = vectors.map(|vector| vector.values().as_chunks::<SPAN>().0);
    let scales = vectors.map(|vector| vector.scales().as_chunks::<2>().0);
    let mut sums = [[[0.0; 8]; Q]; N];
    let packed: [Quad<'_>; Q] = rows.map(|quad| quad.map(|(row, _)| row.as_chunks().0));
    let absmax: [QuadAbsmax<'_, 1>; Q] =
        rows.map(|quad| quad.map(|(_, group)| absmax[group / 2..][..values[0].len()].as_chunks().0));
    steps.add_quads(packed, values, absmax, scales, ahead::<Q>(matrix), &mut sums);
    sums
}

/// The sums of rows with any blocks.
#[inline(always)]
fn any_blocks<S: Steps8x8, const Q: usize, const N: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    vectors: &[Activations8x8<'_>; N],
) -> [[QuadSums; Q]; N] {
    let values = vectors.map(|vector| vector.values().as_chunks::<SPAN>().0);
    let scales = vectors.map(|vector| vector.scales().as_chunks::<2>().0);
    let spans = scales[0].len();
    let mut sums = [[[0.0; 8]; Q]; N];
    for span in (0..spans).step_by(TILE) {
        let end = spans.min(span + TILE);
        let absmax = restored(matrix, rows, 2 * span..2 * end);
        let absmax: [QuadAbsmax<'_, 2>; Q] =
            core::array::from_fn(|q| absmax[q].each_ref().map(|row| &row[..end - span]));
        let packed: [Quad<'_>; Q] = rows.map(|quad| quad.map(|(row, _)| &row.as_chunks().0[span..end]));
        let (values, scales) = (values.map(|values| &values[span..end]), scales.map(|scales| &scales[span..end]));
        steps.add_quads(packed, values, absmax, scales, ahead::<Q>(matrix), &mut sums);
    }
    if spans < values[0].len() {
        // The other half of the span has an absmax and a scale of 0.
        let absmax = restored(matrix, rows, 2 * spans..2 * spans + 1);
        let absmax: [QuadAbsmax<'_, 2>; Q] = core::array::from_fn(|q| absmax[q].each_ref().map(|row| &row[..1]));
        let bytes = rows.map(|quad| quad.map(|(row, _)| [padded(row.as_chunks::<{ SPAN / 2 }>().1)]));
        let packed: [Quad<'_>; Q] = core::array::from_fn(|q| bytes[q].each_ref().map(|bytes| &bytes[..]));
        let scales = vectors.map(|vector| [[vector.scales()[2 * spans], 0.0]]);
        let values = values.map(|values| &values[spans..]);
        steps.add_quads(
            packed,
            values,
            absmax,
            scales.each_ref().map(|scales| &scales[..]),
            ahead::<Q>(matrix),
            &mut sums,
        );
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
