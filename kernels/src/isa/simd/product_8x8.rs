//! The loops of the 8x8 product of a few vectors, over rows, vectors and columns.
//!
//! ```text
//! for 4 Q rows:
//!     for up to 4 vectors:
//!         sums[4][2][4 Q] = 0                               even groups, odd groups
//!         for 32 spans of columns:
//!             absmax = of the groups of these rows          on the stack, rows side by side
//!             for each span:                                the step `add_quads`
//!                 for each row: decode(packed[row]), and for each vector: products = weights . x
//!                 sums += f32(products of each group) * (absmax * scale)
//!         out = (sums[0] + sums[1]) * WEIGHT_STEP_8X8
//! ```

use super::absmax;
use super::product_16x4::padded;
use super::steps::Steps;
use super::steps_8x8::{Quad, QuadAbsmax, QuadSums, Steps8x8};
use crate::activations::Activations8x8;
use crate::format::BlockSize;
use crate::isa::scalar::product_8x8::result;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Spans of a tile, whose absmax wait on the stack.
const TILE: usize = 64;

/// Packed bytes and first group of some rows.
type Rows<'a, const Q: usize> = [[(&'a [u8], usize); 4]; Q];

/// The absmax of the groups of a tile, of which there is one or two in a span.
type Tile<const Q: usize> = [[[[f32; 4]; 2]; TILE]; Q];

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
    let mut absmax = [[[[0.0; 4]; 2]; TILE]; Q];
    for (tile, out) in out.chunks_mut(4 * Q * batch).enumerate() {
        let (first, last) = (4 * Q * tile, 4 * Q * tile + out.len() / batch - 1);
        // Where there are less rows, the last one stands in for those that are missing.
        let rows: Rows<'_, Q> =
            core::array::from_fn(|q| core::array::from_fn(|r| matrix.grouped_row(last.min(first + 4 * q + r))));
        for vector in (0..batch).step_by(VECTORS) {
            match batch - vector {
                VECTORS.. if S::FEW > 3 => {
                    multiply_vectors::<S, Q, VECTORS>(steps, matrix, &rows, activations, vector, &mut absmax, out)
                }
                3 if S::FEW > 2 => {
                    multiply_vectors::<S, Q, 3>(steps, matrix, &rows, activations, vector, &mut absmax, out)
                }
                2 if S::FEW > 1 => {
                    multiply_vectors::<S, Q, 2>(steps, matrix, &rows, activations, vector, &mut absmax, out)
                }
                _ => multiply_vectors::<S, Q, 1>(steps, matrix, &rows, activations, vector, &mut absmax, out),
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
    absmax: &mut Tile<Q>,
    out: &mut [f32],
) {
    let vectors: [Activations8x8<'_>; N] = core::array::from_fn(|n| activations.vector(first + n));
    let sums = if matrix.block_size() != BlockSize::B32 && matrix.is_row_aligned() {
        // Each span lies in one block.
        sums_of_rows::<S, Q, N, 1>(steps, matrix, rows, &vectors, absmax)
    } else {
        sums_of_rows::<S, Q, N, 2>(steps, matrix, rows, &vectors, absmax)
    };
    for (n, sums) in sums.iter().enumerate() {
        for (row, out) in out.chunks_exact_mut(activations.batch()).enumerate() {
            let sums = &sums[row / 4 % Q];
            out[first + n] = result([sums[row % 4], sums[4 + row % 4]]);
        }
    }
}

/// The sums of rows, with `GROUPS` absmax in each of their spans.
#[inline(always)]
fn sums_of_rows<S: Steps8x8, const Q: usize, const N: usize, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    rows: &Rows<'_, Q>,
    vectors: &[Activations8x8<'_>; N],
    tile: &mut Tile<Q>,
) -> [[QuadSums; Q]; N] {
    let ahead = ahead::<S, Q>(matrix);
    let shift = matrix.block_size().get().trailing_zeros() - (SPAN / GROUPS).trailing_zeros();
    let mut values = [&[[0; SPAN]; 0][..]; N];
    let mut scales = [&[[0.0; 2]; 0][..]; N];
    for n in 0..N {
        values[n] = vectors[n].values().as_chunks().0;
        scales[n] = vectors[n].scales().as_chunks().0;
    }
    let spans = scales[0].len();
    let mut sums = [[[0.0; 8]; Q]; N];
    // Loops, because the compiler does not inline what maps arrays of arrays.
    let mut packed: [Quad<'_>; Q] = [[&[]; 4]; Q];
    for span in (0..spans).step_by(TILE) {
        let end = spans.min(span + TILE);
        for (q, tile) in tile.iter_mut().enumerate() {
            let tile = &mut tile.as_flattened_mut()[..(end - span) * GROUPS];
            let first = rows[q].map(|(_, group)| group * GROUPS / 2 + span * GROUPS);
            absmax::of_rows(matrix.absmax(), first, shift, tile);
        }
        let mut absmax: [QuadAbsmax<'_, GROUPS>; Q] = [&[]; Q];
        for q in 0..Q {
            for r in 0..4 {
                packed[q][r] = &rows[q][r].0.as_chunks().0[span..end];
            }
            absmax[q] = &tile[q].as_flattened().as_chunks().0[..end - span];
        }
        let (mut now, mut scales_now) = (values, scales);
        for n in 0..N {
            now[n] = &values[n][span..end];
            scales_now[n] = &scales[n][span..end];
        }
        steps.add_quads(packed, now, absmax, scales_now, ahead, &mut sums);
    }
    if GROUPS == 2 && spans < values[0].len() {
        // The other half of the span has an absmax and a scale of 0.
        let mut absmax = [[[[0.0; 4]; GROUPS]; 1]; Q];
        for (absmax, rows) in absmax.iter_mut().zip(rows) {
            absmax::of_rows(matrix.absmax(), rows.map(|(_, group)| group + 2 * spans), shift, &mut absmax[0][..1]);
        }
        let bytes = rows.map(|quad| quad.map(|(row, _)| [padded(row.as_chunks::<{ SPAN / 2 }>().1)]));
        let packed: [Quad<'_>; Q] = bytes.each_ref().map(|quad| quad.each_ref().map(|bytes| &bytes[..]));
        let scales = vectors.map(|vector| [[vector.scales()[2 * spans], 0.0]]);
        let (values, scales) = (values.map(|values| &values[spans..]), scales.each_ref().map(|scales| &scales[..]));
        steps.add_quads(packed, values, absmax.each_ref().map(|absmax| &absmax[..]), scales, ahead, &mut sums);
    }
    sums
}

/// How many bytes it is to the same columns of rows that come next, and are far enough away.
#[inline(always)]
fn ahead<S: Steps8x8, const Q: usize>(matrix: &Nf4Matrix<'_>) -> usize {
    let next = (4 * Q * matrix.cols() / 2).max(1);
    next * S::AHEAD.div_ceil(next)
}
