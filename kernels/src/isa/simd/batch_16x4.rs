//! The loops of the 16x4 GEMM over rows, tiles of columns and vectors.
//!
//! With few vectors the weights of a span are decoded into registers and multiplied at once; with many they are decoded
//! into a panel that all vectors use, see [`super::panel_16x4`].

use super::panel_16x4;
use super::product_16x4::{padded, result};
use super::steps::Steps;
use super::steps_16x4::{Panels16x4, Steps16x4};
use crate::activations::Activations;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// From how many vectors on their activations are read again for each panel of weights, instead of the weights for each
/// eight vectors.
const MANY: usize = 32;

/// Spans of all vectors of a tile: 16 KB of activations.
const SPANS: usize = 128;
/// Rows of all vectors of a tile: 32 KB of lanes.
const ROWS: usize = 1024;

/// The activations and their scales of some vectors in a tile: of each span those of all vectors.
#[repr(align(64))]
struct Panel<const GROUPS: usize> {
    values: [[i16; SPAN]; SPANS],
    scales: [[f32; GROUPS]; SPANS],
}

/// The 16x4 product of a row-aligned matrix and a batch.
///
/// Up to eight vectors at a time: the 64 weights of a span are decoded into registers, once for all eight, and the
/// lanes of the vectors stay in registers too. The activations of a tile of columns are brought together on the stack,
/// in the order of use, aligned, and small enough for the nearest cache; so a tile of rows shares them. The lanes of a
/// row wait on the stack from one tile of columns to the next, so that they are added to in the order of [`gemv`].
#[inline(always)]
pub(in crate::isa) fn gemm<S: Panels16x4>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    if activations.batch() < MANY {
        gemm_eights(steps, matrix, activations, out);
    } else if activations.group() == SPAN {
        panel_16x4::gemm::<S, 1>(steps, matrix, activations, out);
    } else {
        panel_16x4::gemm::<S, 2>(steps, matrix, activations, out);
    }
}

/// [`gemm`] without panels.
#[inline(always)]
pub(in crate::isa) fn gemm_eights<S: Steps16x4>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    if activations.group() == SPAN {
        eights::<S, 1>(steps, matrix, activations, out);
    } else {
        eights::<S, 2>(steps, matrix, activations, out);
    }
}

#[inline(always)]
fn eights<S: Steps16x4, const GROUPS: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let mut first = 0;
    while first < activations.batch() {
        let left = S::VECTORS.min(activations.batch() - first);
        match left {
            8.. => steps.few_vectors::<GROUPS, 8>(matrix, activations, first, out),
            4.. => steps.few_vectors::<GROUPS, 4>(matrix, activations, first, out),
            3 => steps.few_vectors::<GROUPS, 3>(matrix, activations, first, out),
            2 => steps.few_vectors::<GROUPS, 2>(matrix, activations, first, out),
            _ => steps.few_vectors::<GROUPS, 1>(matrix, activations, first, out),
        }
        first += if (5..8).contains(&left) { 4 } else { left };
    }
}

/// The products with the `N` vectors from `first` on.
#[inline(always)]
pub(in crate::isa) fn few_vectors<S: Steps16x4, const GROUPS: usize, const N: usize>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first: usize,
    out: &mut [f32],
) {
    let vectors: [Activations<'_>; N] = core::array::from_fn(|n| activations.vector(first + n));
    let mut panel = Panel { values: [[0; SPAN]; SPANS], scales: [[0.0; GROUPS]; SPANS] };
    let mut lanes = [[0.0; 8]; ROWS];
    let (lanes, _) = lanes.as_chunks_mut::<N>();
    let (mut absmax, mut factors) = ([[0.0; GROUPS]; SPANS], [[0.0; GROUPS]; SPANS]);
    let width = SPANS / N * SPAN;
    let piece = |row, column| {
        let (packed, first_block) = matrix.aligned_row(row);
        (&packed[column / 2..matrix.cols().min(column + width) / 2], first_block)
    };
    for (tile, out) in out.chunks_mut(lanes.len().saturating_mul(activations.batch())).enumerate() {
        let first_row = tile * lanes.len();
        let lanes = &mut lanes[..out.len() / activations.batch()];
        lanes.fill([[0.0; 8]; N]);
        for column in (0..matrix.cols()).step_by(width) {
            let columns = (matrix.cols() - column).min(width);
            let (first_group, groups) = (column / (SPAN / GROUPS), columns / (SPAN / GROUPS));
            fill_panel(&mut panel, &vectors, column);
            for (row, lanes) in (first_row..).zip(&mut *lanes) {
                let (packed, first_block) = piece(row, column);
                // The next row's piece is one that a prefetcher of the processor does not expect.
                if row + 1 < matrix.rows() {
                    let (next, _) = piece(row + 1, column);
                    (0..next.len()).step_by(64).for_each(|line| steps.prefetch(next, line));
                }
                let (absmax_of_groups, missing) = absmax.as_flattened_mut().split_at_mut(groups);
                matrix.group_absmax_rest(first_block, first_group, absmax_of_groups);
                // What an earlier tile left there may be infinite, and infinity times a scale of 0 is NaN.
                missing.iter_mut().take(GROUPS - 1).for_each(|absmax| *absmax = 0.0);
                add_tile(steps, lanes, packed, &panel, &absmax, &mut factors);
            }
        }
        for (out, lanes) in out.chunks_mut(activations.batch()).zip(lanes) {
            for (out, lanes) in out[first..].iter_mut().zip(lanes) {
                *out = result(steps, steps.load(lanes));
            }
        }
    }
}

/// Brings together what a tile needs of each vector, from `column` on.
#[inline(always)]
fn fill_panel<const GROUPS: usize, const N: usize>(
    panel: &mut Panel<GROUPS>,
    vectors: &[Activations<'_>; N],
    column: usize,
) {
    for (n, vector) in vectors.iter().enumerate() {
        let values = vector.values()[column..].as_chunks::<SPAN>().0;
        for (panel, values) in panel.values.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            panel[n] = *values;
        }
        let scales = vector.scales()[column / (SPAN / GROUPS)..].chunks(GROUPS);
        for (panel, scales) in panel.scales.as_chunks_mut::<N>().0.iter_mut().zip(scales) {
            // A group that is not there has a scale of 0.
            panel[n] = core::array::from_fn(|g| scales.get(g).copied().unwrap_or(0.0));
        }
    }
}

/// Adds the products of the columns of a row in a tile and `N` vectors to their lanes. Overwrites `factors`.
#[inline(always)]
fn add_tile<S: Steps16x4, const GROUPS: usize, const N: usize>(
    steps: &Steps<S>,
    lanes: &mut [[f32; 8]; N],
    packed: &[u8],
    panel: &Panel<GROUPS>,
    absmax: &[[f32; GROUPS]; SPANS],
    factors: &mut [[f32; GROUPS]; SPANS],
) {
    let (packed, half) = packed.as_chunks();
    let spans = packed.len() + usize::from(!half.is_empty());
    let scales = panel.scales.as_chunks::<N>().0[..spans].iter();
    for ((factors, scales), absmax) in factors.as_chunks_mut::<N>().0.iter_mut().zip(scales).zip(absmax) {
        *factors = scales.map(|scales| core::array::from_fn(|group| absmax[group] * scales[group]));
    }
    let mut sums = [steps.load(&[0.0; 8]); N];
    for (sum, lanes) in sums.iter_mut().zip(&*lanes) {
        *sum = steps.load(lanes);
    }
    let mut panels = panel.values.as_chunks::<N>().0.iter().zip(factors.as_chunks::<N>().0);
    for (packed, (values, factors)) in packed.iter().zip(&mut panels) {
        add_span(steps, &mut sums, packed, values, factors);
    }
    if let (false, Some((values, factors))) = (half.is_empty(), panels.next()) {
        // The other half of the span has a product of 0, which changes no lane.
        add_span(steps, &mut sums, &padded(half), values, factors);
    }
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        steps.store(lanes, sum);
    }
}

/// Adds the products of a span and `N` vectors to their lanes.
#[inline(always)]
fn add_span<S: Steps16x4, const GROUPS: usize, const N: usize>(
    steps: &Steps<S>,
    sums: &mut [S::Lanes; N],
    packed: &[u8; SPAN / 2],
    values: &[[i16; SPAN]; N],
    factors: &[[f32; GROUPS]; N],
) {
    let weights = steps.decode_span(packed);
    for ((sum, values), factors) in sums.iter_mut().zip(values).zip(factors) {
        *sum = steps.add_products(*sum, weights, steps.load_span(values), factors);
    }
}
