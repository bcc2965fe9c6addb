//! The 16x4 product of a batch.
//!
//! Weights are decoded once into 16-bit values on the stack, in the order of the activations, for all vectors of the
//! batch: tiles of `ROWS` rows and `COLUMNS` columns. Two rows at a time then share the loads of a vector. The lanes of
//! a row and a vector wait on the stack from one tile of columns to the next, so that they are added to in the order of
//! `gemv`.

use core::arch::wasm32::*;

use super::gemv::{decode_span, i16_planes, load_span, sums_of_span};
use super::vector::*;
use crate::activations::{Activations, SPAN};
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Rows of a tile: 16 KB of decoded weights, and as much of lanes.
const ROWS: usize = 4;
/// Columns of a tile.
const COLUMNS: usize = 2048;
const SPANS: usize = COLUMNS / SPAN;
/// Vectors whose lanes are held at once.
const VECTORS: usize = 128;

/// The lanes of a row for each vector.
type Lanes = [[f32; 8]; VECTORS];

/// The decoded weights of a row in a tile, span by span, and the absmax of their groups.
#[repr(align(64))]
struct Row<const SCALES: usize> {
    weights: [[i16; SPAN]; SPANS],
    absmax: [f32; SCALES],
}

/// The 16x4 product of a batch.
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemm_groups::<1, SPANS>(matrix, activations, out);
    } else {
        gemm_groups::<2, { 2 * SPANS }>(matrix, activations, out);
    }
}

/// The product with `GROUPS` activation groups in a span of 64 columns; `SCALES` is `GROUPS * SPANS`.
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
                for n in 0..vectors {
                    let x = values[n * values_len + column..(n + 1) * values_len].as_chunks().0;
                    let x = &x[..SPANS.min(x.len())];
                    let scales = &scales[n * scales_len + column / (SPAN / GROUPS)..(n + 1) * scales_len];
                    let scales = &scales[..SCALES.min(scales.len())];
                    let (pairs, last) = rows[..count].as_chunks::<2>();
                    let (lane_pairs, last_lanes) = lanes[..count].as_chunks_mut::<2>();
                    for (rows, [a, b]) in pairs.iter().zip(lane_pairs) {
                        add_rows::<GROUPS, SCALES, 2>(rows, x, scales, [&mut a[n], &mut b[n]]);
                    }
                    for (row, lanes) in last.iter().zip(last_lanes) {
                        add_rows::<GROUPS, SCALES, 1>(core::array::from_ref(row), x, scales, [&mut lanes[n]]);
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

#[inline]
fn store_span(weights: [v128; 8], out: &mut [i16; SPAN]) {
    for (out, w) in out.as_chunks_mut().0.iter_mut().zip(weights) {
        store_i16(out, w);
    }
}

/// Adds the products of `R` rows and a vector in a tile to their lanes.
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize, const R: usize>(
    rows: &[Row<SCALES>; R],
    x: &[[i16; SPAN]],
    scales: &[f32],
    lanes: [&mut [f32; 8]; R],
) {
    let mut products = [[0.0; SCALES]; R];
    for (products, row) in products.iter_mut().zip(rows) {
        for ((product, absmax), scale) in products.iter_mut().zip(&row.absmax).zip(scales) {
            *product = absmax * scale;
        }
    }
    let mut sums = [[f32x4_splat(0.0); 2]; R];
    for (sum, lanes) in sums.iter_mut().zip(&lanes) {
        *sum = load_f32(lanes);
    }
    for (s, x) in x.iter().enumerate().take(SPANS) {
        let x = load_span(x);
        for ((total, row), products) in sums.iter_mut().zip(rows).zip(&products) {
            let [low, high] = sums_of_span(load_span(&row.weights[s]), x);
            let exact = [f32x4_convert_i32x4(low), f32x4_convert_i32x4(high)];
            let scale = spread::<GROUPS>(&products.as_chunks().0[s]);
            *total = sum(*total, product(exact, scale));
        }
    }
    for (lanes, sum) in lanes.into_iter().zip(sums) {
        store_f32(lanes, sum);
    }
}
