//! The f32 product of a batch.

use core::arch::x86_64::*;

use super::dequantize::{f32_planes, look_up_f32, split_codes};
use super::gemv_f32::arrange_f32;
use super::vector::*;
use crate::activations::SPAN;
use crate::format::canonical;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Rows of a tile: 32 KB of decoded weights.
const ROWS: usize = 8;
/// Columns of a tile, a part of a panel.
const COLUMNS: usize = 1024;
const SPANS: usize = COLUMNS / SPAN;
/// Vectors whose lanes are held at once.
const VECTORS: usize = 64;

/// The decoded weights of a row in a tile, in the order of [`spec::F32_SLOTS`], and the absmax of their groups.
#[repr(align(64))]
struct Row<const SCALES: usize> {
    weights: [[f32; SPAN]; SPANS],
    absmax: [f32; SCALES],
}

/// The f32 product of a batch. As in `gemm`, weights are decoded once for all vectors; here a vector's inputs are
/// arranged again for each tile of rows.
#[target_feature(enable = "avx2")]
pub(super) fn gemm_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    if !matrix.is_row_aligned() {
        scalar::gemm_f32(matrix, inputs, out);
    } else if matrix.block_size().group() == SPAN {
        gemm_f32_groups::<1, SPANS>(matrix, inputs, out);
    } else {
        gemm_f32_groups::<2, { 2 * SPANS }>(matrix, inputs, out);
    }
}

/// The product with `GROUPS` blocks in a span of 64 columns at most; `SCALES` is `GROUPS * SPANS`.
#[target_feature(enable = "avx2")]
fn gemm_f32_groups<const GROUPS: usize, const SCALES: usize>(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    let (cols, batch) = (matrix.cols(), inputs.len() / matrix.cols());
    let mut rows: [Row<SCALES>; ROWS] =
        core::array::from_fn(|_| Row { weights: [[0.0; SPAN]; SPANS], absmax: [0.0; SCALES] });
    let mut lanes = [[[0.0; 8]; ROWS]; VECTORS];
    let mut arranged = [0.0; COLUMNS];
    out.fill(0.0);
    for first in (0..batch).step_by(VECTORS) {
        let vectors = VECTORS.min(batch - first);
        let inputs = &inputs[first * cols..][..vectors * cols];
        for (tile, out) in out.chunks_mut(ROWS * batch).enumerate() {
            let count = out.len() / batch;
            for column in (0..cols).step_by(COLUMNS) {
                let width = COLUMNS.min(cols - column);
                let spans = width.div_ceil(SPAN);
                for (r, row) in rows[..count].iter_mut().enumerate() {
                    decode_row::<GROUPS, SCALES>(matrix, tile * ROWS + r, column, width, row);
                }
                for (inputs, lanes) in inputs.chunks(cols).zip(&mut lanes) {
                    arrange_f32(&inputs[column..column + width], &mut arranged[..spans * SPAN]);
                    if column.is_multiple_of(spec::PANEL) {
                        lanes.fill([0.0; 8]);
                    }
                    let x = &arranged.as_chunks().0[..spans];
                    let (fours, rest) = rows[..count].as_chunks::<4>();
                    let (lane_fours, rest_lanes) = lanes[..count].as_chunks_mut::<4>();
                    for (rows, lanes) in fours.iter().zip(lane_fours) {
                        add_rows::<GROUPS, SCALES, 4>(rows, x, lanes);
                    }
                    for (row, lanes) in rest.iter().zip(rest_lanes) {
                        add_rows::<GROUPS, SCALES, 1>(core::array::from_ref(row), x, core::array::from_mut(lanes));
                    }
                }
                let end = column + width;
                if end == cols || end.is_multiple_of(spec::PANEL) {
                    for (r, out) in out.chunks_mut(batch).enumerate() {
                        for (out, lanes) in out[first..first + vectors].iter_mut().zip(&lanes) {
                            *out += add_lanes(load_f32(&lanes[r]));
                        }
                    }
                }
            }
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Decodes `width` columns from `column` on of a row of the matrix.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_row<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    row: usize,
    column: usize,
    width: usize,
    out: &mut Row<SCALES>,
) {
    let planes = f32_planes();
    let (packed, first_block) = matrix.aligned_row(row);
    let groups = width / (SPAN / GROUPS);
    // A group that is not there has inputs of zero.
    out.absmax[groups..].fill(0.0);
    matrix.group_absmax_rest(first_block, column / (SPAN / GROUPS), &mut out.absmax[..groups]);
    for (packed, weights) in packed[column / 2..][..width / 2].chunks(SPAN / 2).zip(&mut out.weights) {
        let mut padded = [0; SPAN / 2];
        padded[..packed.len()].copy_from_slice(packed);
        let [even, odd] = split_codes(&padded);
        let (vectors, _) = weights.as_chunks_mut();
        let (evens, odds) = vectors.split_at_mut(4);
        for (out, codes) in [(evens, even), (odds, odd)] {
            for (out, w) in out.iter_mut().zip(look_up_f32(codes, &planes)) {
                store_f32(out, w);
            }
        }
    }
}

/// Adds the products of `R` rows, which share the loads of the inputs, and a vector in a tile to their lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize, const R: usize>(
    rows: &[Row<SCALES>; R],
    inputs: &[[f32; SPAN]],
    lanes: &mut [[f32; 8]; R],
) {
    let mut totals = [_mm256_setzero_ps(); R];
    for (total, lanes) in totals.iter_mut().zip(lanes.iter()) {
        *total = load_f32(lanes);
    }
    for (s, x) in inputs.iter().enumerate().take(SPANS) {
        let mut vectors = [_mm256_setzero_ps(); 8];
        for (vector, x) in vectors.iter_mut().zip(x.as_chunks().0) {
            *vector = load_f32(x);
        }
        for (total, row) in totals.iter_mut().zip(rows) {
            let (w, _) = row.weights[s].as_chunks();
            let product = |j: usize| _mm256_mul_ps(vectors[j], load_f32(&w[j]));
            let ab = _mm256_add_ps(product(0), product(1));
            let abcd = _mm256_add_ps(ab, _mm256_add_ps(product(2), product(3)));
            let ef = _mm256_add_ps(product(4), product(5));
            let sums = _mm256_add_ps(abcd, _mm256_add_ps(ef, _mm256_add_ps(product(6), product(7))));
            let absmax = spread::<GROUPS>(&row.absmax.as_chunks().0[s]);
            *total = _mm256_add_ps(*total, _mm256_mul_ps(sums, absmax));
        }
    }
    for (lanes, total) in lanes.iter_mut().zip(totals) {
        store_f32(lanes, total);
    }
}
