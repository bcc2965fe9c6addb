//! The 16x4 product of a batch.
//!
//! Eight vectors at a time: the 64 weights of a span are decoded into four registers, once for all eight, and the lanes of
//! the eight vectors stay in eight more. The activations of a tile of columns are brought together on the stack, in the
//! order of use, aligned, and small enough for the nearest cache; so a tile of rows shares them. The lanes of a row wait on the
//! stack from one tile of columns to the next, so that they are added to in the order of `gemv`.

use core::arch::x86_64::*;

use super::gemv::{decode_span, i16_planes, result, sums_of_span};
use super::vector::*;
use crate::activations::{Activations, SPAN};
use crate::matrix::Nf4Matrix;

/// Vectors whose lanes are held in registers.
const VECTORS: usize = 8;
/// Spans of a tile: 16 KB of activations of eight vectors.
const SPANS: usize = 16;
/// Rows of a tile: 32 KB of lanes of eight vectors.
const ROWS: usize = 128;

/// The activations and their scales of `N` vectors in a tile, span by span.
#[repr(align(64))]
struct Panel<const GROUPS: usize, const N: usize> {
    values: [[[i16; SPAN]; N]; SPANS],
    scales: [[[f32; GROUPS]; N]; SPANS],
}

/// The 16x4 product of a batch.
#[target_feature(enable = "avx2")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemm_groups::<1>(matrix, activations, out);
    } else {
        gemm_groups::<2>(matrix, activations, out);
    }
}

/// The product with `GROUPS` activation groups in a span of 64 columns.
#[target_feature(enable = "avx2")]
fn gemm_groups<const GROUPS: usize>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let mut first = 0;
    while first < activations.batch() {
        first += match activations.batch() - first {
            VECTORS.. => gemm_vectors::<GROUPS, VECTORS>(matrix, activations, first, out),
            4.. => gemm_vectors::<GROUPS, 4>(matrix, activations, first, out),
            3.. => gemm_vectors::<GROUPS, 3>(matrix, activations, first, out),
            2.. => gemm_vectors::<GROUPS, 2>(matrix, activations, first, out),
            _ => gemm_vectors::<GROUPS, 1>(matrix, activations, first, out),
        };
    }
}

/// The products with the `N` vectors from `first` on; returns `N`.
#[target_feature(enable = "avx2")]
fn gemm_vectors<const GROUPS: usize, const N: usize>(
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first: usize,
    out: &mut [f32],
) -> usize {
    let planes = i16_planes();
    let vectors: [Activations<'_>; N] = core::array::from_fn(|n| activations.vector(first + n));
    let mut panel = Panel { values: [[[0; SPAN]; N]; SPANS], scales: [[[0.0; GROUPS]; N]; SPANS] };
    let mut lanes = [[[0.0; 8]; N]; ROWS];
    for (tile, out) in out.chunks_mut(ROWS * activations.batch()).enumerate() {
        let lanes = &mut lanes[..out.len() / activations.batch()];
        lanes.fill([[0.0; 8]; N]);
        for column in (0..matrix.cols()).step_by(SPANS * SPAN) {
            let columns = (matrix.cols() - column).min(SPANS * SPAN);
            fill_panel(&mut panel, &vectors, column);
            for (row, lanes) in (tile * ROWS..).zip(&mut *lanes) {
                let (packed, first_block) = matrix.aligned_row(row);
                let first_group = column / (SPAN / GROUPS);
                let mut absmax = [[0.0; GROUPS]; SPANS];
                let groups = columns / (SPAN / GROUPS);
                matrix.group_absmax_rest(first_block, first_group, &mut absmax.as_flattened_mut()[..groups]);
                add_columns(lanes, &packed[column / 2..][..columns / 2], &panel, &planes, &absmax);
            }
        }
        for (out, lanes) in out.chunks_mut(activations.batch()).zip(lanes) {
            for (out, lanes) in out[first..].iter_mut().zip(lanes) {
                *out = result(load_f32(lanes));
            }
        }
    }
    N
}

/// Brings together what a tile needs of each vector, from `column` on.
fn fill_panel<const GROUPS: usize, const N: usize>(
    panel: &mut Panel<GROUPS, N>,
    vectors: &[Activations<'_>; N],
    column: usize,
) {
    for (n, vector) in vectors.iter().enumerate() {
        let values = vector.values()[column..].as_chunks::<SPAN>().0;
        for (panel, values) in panel.values.iter_mut().zip(values) {
            panel[n] = *values;
        }
        let scales = vector.scales()[column / (SPAN / GROUPS)..].chunks(GROUPS);
        for (panel, scales) in panel.scales.iter_mut().zip(scales) {
            // A group that is not there has a scale of 0.
            panel[n] = core::array::from_fn(|g| scales.get(g).copied().unwrap_or(0.0));
        }
    }
}

/// Adds the products of the columns of a row in a tile and `N` vectors to their lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_columns<const GROUPS: usize, const N: usize>(
    lanes: &mut [[f32; 8]; N],
    packed: &[u8],
    panel: &Panel<GROUPS, N>,
    planes: &[__m256i; 2],
    absmax: &[[f32; GROUPS]; SPANS],
) {
    let mut sums = [_mm256_setzero_ps(); N];
    for (sum, lanes) in sums.iter_mut().zip(&*lanes) {
        *sum = load_f32(lanes);
    }
    let (packed, half) = packed.as_chunks();
    let mut panels = panel.values.iter().zip(&panel.scales).zip(absmax);
    for (packed, ((values, scales), absmax)) in packed.iter().zip(&mut panels) {
        add_span(&mut sums, packed, values, absmax, scales, planes);
    }
    if let (false, Some(((values, scales), absmax))) = (half.is_empty(), panels.next()) {
        let mut packed = [0; SPAN / 2];
        packed[..half.len()].copy_from_slice(half);
        // The other half of the span has a product of 0, which changes no lane.
        add_span(&mut sums, &packed, values, absmax, scales, planes);
    }
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        store_f32(lanes, sum);
    }
}

/// Adds the products of a span and `N` vectors.
#[target_feature(enable = "avx2")]
#[inline]
fn add_span<const GROUPS: usize, const N: usize>(
    sums: &mut [__m256; N],
    packed: &[u8; SPAN / 2],
    values: &[[i16; SPAN]; N],
    absmax: &[f32; GROUPS],
    scales: &[[f32; GROUPS]; N],
    planes: &[__m256i; 2],
) {
    // The lanes of eight vectors and the weights leave no register for the tables.
    let weights = if N < VECTORS {
        decode_span(packed, planes)
    } else {
        decode_span(packed, &[load_again(&planes[0]), load_again(&planes[1])])
    };
    let mut products = [[0.0; GROUPS]; N];
    for (products, scales) in products.iter_mut().zip(scales) {
        *products = core::array::from_fn(|g| absmax[g] * scales[g]);
    }
    for (n, sum) in sums.iter_mut().enumerate() {
        let exact = _mm256_cvtepi32_ps(sums_of_span(weights, &values[n]));
        *sum = _mm256_add_ps(*sum, _mm256_mul_ps(exact, broadcast(&products[n])));
    }
}
