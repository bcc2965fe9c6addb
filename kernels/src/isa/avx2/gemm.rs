//! The 16x4 product of a batch.
//!
//! Weights are decoded once into 16-bit values on the stack, in the order of the activations, for all vectors of the batch:
//! tiles of `ROWS` rows and `COLUMNS` columns. Two rows and two vectors at a time then share their loads. The lanes of a row and
//! a vector wait on the stack from one tile of columns to the next, so that they are added to in the order of `gemv`.

use core::arch::x86_64::*;

use super::gemv::{decode_span, i16_planes, spread_products};
use super::vector::*;
use crate::activations::{Activations, SPAN};
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Rows of a tile: 8 KB of decoded weights, and 16 KB of lanes.
const ROWS: usize = 4;
/// Columns of a tile.
const COLUMNS: usize = 1024;
const SPANS: usize = COLUMNS / SPAN;
/// Vectors whose lanes are held at once.
const VECTORS: usize = 128;

/// The lanes of a row for each vector.
type Lanes = [[f32; 8]; VECTORS];

/// The decoded weights of a row in a tile, span by span, and the absmax of their groups.
struct Row<const SCALES: usize> {
    weights: [[i16; SPAN]; SPANS],
    absmax: [f32; SCALES],
}

/// The 16x4 product of a batch.
#[target_feature(enable = "avx2")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemm_groups::<1, SPANS>(matrix, activations, out);
    } else {
        gemm_groups::<2, { 2 * SPANS }>(matrix, activations, out);
    }
}

/// The product with `GROUPS` activation groups in a span of 64 columns; `SCALES` is `GROUPS * SPANS`.
#[target_feature(enable = "avx2")]
fn gemm_groups<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let batch = activations.batch();
    let (values_len, scales_len) = (activations.values().len() / batch, activations.scales().len() / batch);
    let mut rows: [Row<SCALES>; ROWS] =
        core::array::from_fn(|_| Row { weights: [[0; SPAN]; SPANS], absmax: [0.0; SCALES] });
    let mut lanes: [Lanes; ROWS] = [[[0.0; 8]; VECTORS]; ROWS];
    for first in (0..batch).step_by(VECTORS) {
        let vectors = VECTORS.min(batch - first);
        let values = &activations.values()[first * values_len..][..vectors * values_len];
        let scales = &activations.scales()[first * scales_len..][..vectors * scales_len];
        for (tile, out) in out.chunks_mut(ROWS * batch).enumerate() {
            let count = out.len() / batch;
            lanes[..count].iter_mut().for_each(|lanes| lanes[..vectors].fill([0.0; 8]));
            for column in (0..matrix.cols()).step_by(COLUMNS) {
                for (r, row) in rows[..count].iter_mut().enumerate() {
                    decode_row::<GROUPS, SCALES>(matrix, tile * ROWS + r, column, row);
                }
                let vector = |n: usize| {
                    let spans = values[n * values_len + column..(n + 1) * values_len].as_chunks().0;
                    let scales = &scales[n * scales_len + column / (SPAN / GROUPS)..(n + 1) * scales_len];
                    (&spans[..SPANS.min(spans.len())], &scales[..SCALES.min(scales.len())])
                };
                for n in (0..vectors).step_by(2) {
                    for (rows, lanes) in rows[..count].chunks(2).zip(lanes[..count].chunks_mut(2)) {
                        match (rows, lanes) {
                            ([a, b], [la, lb]) if n + 1 < vectors => {
                                let lanes = [[la[n], la[n + 1]], [lb[n], lb[n + 1]]];
                                let sums = block::<GROUPS, SCALES, 2, 2>([a, b], [vector(n), vector(n + 1)], lanes);
                                [[la[n], la[n + 1]], [lb[n], lb[n + 1]]] = sums;
                            }
                            (rows, lanes) => {
                                for (row, lanes) in rows.iter().zip(lanes) {
                                    for (n, lanes) in (n..).zip(&mut lanes[n..vectors.min(n + 2)]) {
                                        [[*lanes]] = block::<GROUPS, SCALES, 1, 1>([row], [vector(n)], [[*lanes]]);
                                    }
                                }
                            }
                        }
                    }
                }
            }
            for (out, lanes) in out.chunks_mut(batch).zip(&lanes) {
                for (out, lanes) in out[first..first + vectors].iter_mut().zip(lanes) {
                    *out = canonical(add_lanes(load_f32(lanes)) * spec::WEIGHT_STEP);
                }
            }
        }
    }
}

/// Decodes the columns from `column` on of a row of the matrix, as many as a tile has.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_row<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    row: usize,
    column: usize,
    out: &mut Row<SCALES>,
) {
    let planes = i16_planes();
    let (packed, first_block) = matrix.aligned_row(row);
    let packed = &packed[column / 2..];
    let packed = &packed[..packed.len().min(COLUMNS / 2)];
    let groups = packed.len() / (SPAN / 2 / GROUPS);
    // A group that is not there has inputs of zero and a product of zero.
    out.absmax[groups..].fill(0.0);
    matrix.group_absmax_rest(first_block, column / (SPAN / GROUPS), &mut out.absmax[..groups]);
    let (spans, half) = packed.as_chunks();
    let (weights, weights_rest) = out.weights.split_at_mut(spans.len());
    for (packed, weights) in spans.iter().zip(weights) {
        store_span(decode_span(packed, &planes), weights);
    }
    if let ([_, ..], [weights, ..]) = (half, weights_rest) {
        let mut packed = [0; SPAN / 2];
        packed[..half.len()].copy_from_slice(half);
        store_span(decode_span(&packed, &planes), weights);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_span(weights: [__m256i; 4], out: &mut [i16; SPAN]) {
    for (out, w) in out.as_chunks_mut().0.iter_mut().zip(weights) {
        store_i16(out, w);
    }
}

/// Adds the products of `R` rows and `N` vectors in a tile to their lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn block<const GROUPS: usize, const SCALES: usize, const R: usize, const N: usize>(
    rows: [&Row<SCALES>; R],
    vectors: [(&[[i16; SPAN]], &[f32]); N],
    lanes: [[[f32; 8]; N]; R],
) -> [[[f32; 8]; N]; R] {
    let mut products = [[[0.0; SCALES]; N]; R];
    for (products, row) in products.iter_mut().zip(rows) {
        for (products, (_, scales)) in products.iter_mut().zip(vectors) {
            for ((product, absmax), scale) in products.iter_mut().zip(&row.absmax).zip(scales) {
                *product = absmax * scale;
            }
        }
    }
    let mut sums = lanes.map(|lanes| lanes.map(|lanes| load_f32(&lanes)));
    for s in 0..vectors[0].0.len() {
        let mut exact = [[_mm256_setzero_si256(); N]; R];
        for part in 0..4 {
            let x = vectors.map(|(spans, _)| load_i16(&spans[s].as_chunks().0[part]));
            for (exact, row) in exact.iter_mut().zip(rows) {
                let w = load_i16(&row.weights[s].as_chunks().0[part]);
                for (exact, x) in exact.iter_mut().zip(x) {
                    *exact = _mm256_add_epi32(*exact, _mm256_madd_epi16(w, x));
                }
            }
        }
        for ((sums, exact), products) in sums.iter_mut().zip(exact).zip(&products) {
            for ((sum, exact), products) in sums.iter_mut().zip(exact).zip(products) {
                let product = spread_products::<GROUPS>(&products.as_chunks().0[s]);
                *sum = _mm256_add_ps(*sum, _mm256_mul_ps(_mm256_cvtepi32_ps(exact), product));
            }
        }
    }
    sums.map(|sums| sums.map(|sum| to_array(sum)))
}
