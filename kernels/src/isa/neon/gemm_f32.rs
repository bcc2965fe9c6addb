//! The f32 product of a batch.

use core::arch::aarch64::*;

use super::dequantize::f32_planes;
use super::gemv_f32::{HALF, add_products_f32, arrange_f32, decode_half_f32, load_half_f32};
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

/// The decoded weights of a row in a tile, in the order of `arrange_f32`, and the absmax of their groups.
#[repr(align(64))]
struct Row<const SCALES: usize> {
    weights: [[f32; SPAN]; SPANS],
    absmax: [f32; SCALES],
}

/// The f32 product of a batch. As in `gemm`, weights are decoded once for all vectors; here a vector's inputs are
/// arranged again for each tile of rows.
#[target_feature(enable = "neon")]
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
#[target_feature(enable = "neon")]
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
                    let (pairs, last) = rows[..count].as_chunks::<2>();
                    let (lane_pairs, last_lanes) = lanes[..count].as_chunks_mut::<2>();
                    for (rows, lanes) in pairs.iter().zip(lane_pairs) {
                        add_rows::<GROUPS, SCALES, 2>(rows, x, lanes);
                    }
                    for (row, lanes) in last.iter().zip(last_lanes) {
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
#[target_feature(enable = "neon")]
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
    let (bytes, _) = packed[column / 2..][..width / 2].as_chunks();
    for (bytes, weights) in bytes.iter().zip(out.weights.as_flattened_mut().as_chunks_mut::<HALF>().0) {
        for (out, w) in weights.as_chunks_mut().0.iter_mut().zip(decode_half_f32(bytes, &planes)) {
            store_f32x4(out, w);
        }
    }
}

/// Adds the products of `R` rows, which share the loads of the inputs, and a vector in a tile to their lanes. The two
/// halves of the lanes take turns: both at once, the compiler runs out of registers.
#[target_feature(enable = "neon")]
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize, const R: usize>(
    rows: &[Row<SCALES>; R],
    inputs: &[[f32; SPAN]],
    lanes: &mut [[f32; 8]; R],
) {
    for half in 0..2 {
        let mut totals = [vdupq_n_f32(0.0); R];
        for (total, lanes) in totals.iter_mut().zip(lanes.iter()) {
            *total = load_f32x4(&lanes.as_chunks().0[half]);
        }
        for (s, x) in inputs.iter().enumerate().take(SPANS) {
            let x = load_half_f32(&x.as_chunks().0[half]);
            for (total, row) in totals.iter_mut().zip(rows) {
                let w = load_half_f32(&row.weights[s].as_chunks().0[half]);
                let absmax = spread::<GROUPS>(&row.absmax.as_chunks().0[s])[half];
                *total = vaddq_f32(*total, vmulq_f32(add_products_f32(w, x), absmax));
            }
        }
        for (lanes, total) in lanes.iter_mut().zip(totals) {
            store_f32x4(&mut lanes.as_chunks_mut().0[half], total);
        }
    }
}
