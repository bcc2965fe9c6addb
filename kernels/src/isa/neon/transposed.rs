//! The f32 product with the transposed matrix.
//!
//! Four rows at a time are decoded, multiplied by the product of absmax and input, and added to the sums of their
//! columns, which stay on the stack in decode order for a panel of columns and a chunk of rows.

use core::arch::aarch64::*;

use super::dequantize::{f32_planes, look_up_f32, split_codes};
use super::products_f32::HALF;
use super::vector::*;
use crate::activations::SPAN;
use crate::format::canonical;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Spans whose factors, absmax times input, are made at once.
const SPANS: usize = 8;

/// The f32 product with the transposed matrix.
#[target_feature(enable = "neon")]
pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    if !matrix.is_row_aligned() {
        scalar::gemv_transposed_f32(matrix, inputs, out);
    } else if matrix.block_size().group() == SPAN {
        transposed_groups::<1, SPANS>(matrix, inputs, out);
    } else {
        transposed_groups::<2, { 2 * SPANS }>(matrix, inputs, out);
    }
}

/// The product with `GROUPS` blocks in a span of 64 columns at most; `SCALES` is `GROUPS * SPANS`.
#[target_feature(enable = "neon")]
fn transposed_groups<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    inputs: &[f32],
    out: &mut [f32],
) {
    let planes = f32_planes();
    let mut panel = [[0.0; SPAN]; spec::PANEL / SPAN];
    for (p, out) in out.chunks_mut(spec::PANEL).enumerate() {
        let panel = &mut panel[..out.len().div_ceil(SPAN)];
        out.fill(0.0);
        for (chunk, inputs) in inputs.chunks(spec::ROW_CHUNK).enumerate() {
            panel.fill([0.0; SPAN]);
            for (four, inputs) in inputs.chunks(4).enumerate() {
                let row = chunk * spec::ROW_CHUNK + four * 4;
                // A row that is not there is the first once more, with factors of zero.
                let mut rows = [matrix.aligned_row(row); 4];
                for (i, r) in rows.iter_mut().enumerate().take(inputs.len()) {
                    *r = matrix.aligned_row(row + i);
                }
                for (stride, sums) in panel.chunks_mut(SPANS).enumerate() {
                    let column = p * spec::PANEL + stride * SPANS * SPAN;
                    let group = column / (SPAN / GROUPS);
                    let groups = SCALES.min(matrix.cols() / (SPAN / GROUPS) - group);
                    let mut factors = [[0.0; SCALES]; 4];
                    for (((_, first_block), factors), x) in rows.iter().zip(&mut factors).zip(inputs) {
                        if groups == SCALES {
                            *factors = matrix.group_absmax(*first_block, group);
                        } else {
                            matrix.group_absmax_rest(*first_block, group, &mut factors[..groups]);
                        }
                        factors.iter_mut().take(groups).for_each(|f| *f *= x);
                    }
                    let packed = rows.map(|(packed, _)| &packed[column / 2..]);
                    // The same columns of the next four rows.
                    for line in (0..SPANS * SPAN / 2).step_by(64) {
                        packed.iter().for_each(|packed| prefetch(packed, 4 * (matrix.cols() / 2) + line));
                    }
                    add_rows::<GROUPS, SCALES>(packed, &factors, sums, &planes);
                }
            }
            add_panel(panel, out);
        }
        out.iter_mut().for_each(|y| *y = canonical(*y));
    }
}

/// Adds four rows, times their factors, to the sums of some spans.
#[target_feature(enable = "neon")]
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize>(
    packed: [&[u8]; 4],
    factors: &[[f32; SCALES]; 4],
    sums: &mut [[f32; SPAN]],
    planes: &[uint8x16_t; 4],
) {
    let [a, b, c, d] = packed;
    let bytes = a.as_chunks().0.iter().zip(b.as_chunks().0).zip(c.as_chunks().0).zip(d.as_chunks().0);
    let halves = sums.as_flattened_mut().as_chunks_mut::<HALF>().0.iter_mut().zip(bytes);
    for (half, (sums, (((a, b), c), d))) in halves.enumerate() {
        let codes = [split_codes(a), split_codes(b), split_codes(c), split_codes(d)];
        for (odd, sums) in sums.as_chunks_mut::<{ HALF / 2 }>().0.iter_mut().enumerate() {
            let scaled = |row: usize| {
                let [a, b, c, d] = look_up_f32(codes[row][odd], planes);
                let factor = [vdupq_n_f32(factors[row][half * GROUPS / 2]); 2];
                [product([a, b], factor), product([c, d], factor)]
            };
            let pair = |a: [F32x8; 2], b: [F32x8; 2]| [sum(a[0], b[0]), sum(a[1], b[1])];
            let fours = pair(pair(scaled(0), scaled(1)), pair(scaled(2), scaled(3)));
            for (sums, four) in sums.as_chunks_mut().0.iter_mut().zip(fours) {
                let total = sum(load_f32(sums), four);
                store_f32(sums, total);
            }
        }
    }
}

/// Adds the sums of a panel, which are in decode order, to the outputs.
fn add_panel(panel: &[[f32; SPAN]], out: &mut [f32]) {
    for (sums, out) in panel.as_flattened().as_chunks::<HALF>().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
        let (even, odd) = sums.split_at(HALF / 2);
        for (out, (even, odd)) in out.as_chunks_mut::<2>().0.iter_mut().zip(even.iter().zip(odd)) {
            out[0] += even;
            out[1] += odd;
        }
    }
}
