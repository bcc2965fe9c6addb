//! The f32 product with the transposed matrix.
//!
//! Four rows at a time are decoded, multiplied by the product of absmax and input, and added to the sums of their
//! columns, which stay on the stack in decode order for a panel of columns and a chunk of rows.

use core::arch::wasm32::*;

use super::dequantize::{f32_planes, look_up_f32, split_codes};
use super::vector::*;
use crate::activations::SPAN;
use crate::format::canonical;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Spans whose factors, absmax times input, are made at once.
const SPANS: usize = 8;

/// The f32 product with the transposed matrix.
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
                    add_rows::<GROUPS, SCALES>(packed, &factors, sums, &planes);
                }
            }
            add_panel(panel, out);
        }
        out.iter_mut().for_each(|y| *y = canonical(*y));
    }
}

/// Adds four rows, times their factors, to the sums of some spans.
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize>(
    packed: [&[u8]; 4],
    factors: &[[f32; SCALES]; 4],
    sums: &mut [[f32; SPAN]],
    planes: &[v128; 4],
) {
    for (s, sums) in sums.iter_mut().enumerate() {
        let (sums, _) = sums.as_chunks_mut::<4>();
        let mut codes = [[u8x16_splat(0); 4]; 4];
        for (codes, packed) in codes.iter_mut().zip(packed) {
            let mut padded = [0; SPAN / 2];
            let packed = &packed[s * SPAN / 2..];
            let packed = packed.first_chunk().unwrap_or_else(|| {
                padded[..packed.len()].copy_from_slice(packed);
                &padded
            });
            let (halves, _) = packed.as_chunks();
            let ([even_0, odd_0], [even_1, odd_1]) = (split_codes(&halves[0]), split_codes(&halves[1]));
            *codes = [even_0, even_1, odd_0, odd_1];
        }
        for i in 0..4 {
            let mut scaled = [[f32x4_splat(0.0); 4]; 4];
            for ((scaled, codes), factors) in scaled.iter_mut().zip(&codes).zip(factors) {
                let factor = spread::<GROUPS>(&factors.as_chunks().0[s])[i % 2];
                *scaled = look_up_f32(codes[i], planes);
                for w in scaled {
                    *w = f32x4_mul(*w, factor);
                }
            }
            for j in 0..4 {
                let pairs = [f32x4_add(scaled[0][j], scaled[1][j]), f32x4_add(scaled[2][j], scaled[3][j])];
                let sum = &mut sums[2 * (4 * (i / 2) + j) + i % 2];
                store_f32x4(sum, f32x4_add(load_f32x4(sum), f32x4_add(pairs[0], pairs[1])));
            }
        }
    }
}

/// Adds the sums of a panel, which are in decode order, to the outputs.
fn add_panel(panel: &[[f32; SPAN]], out: &mut [f32]) {
    for (sums, out) in panel.iter().zip(out.chunks_mut(SPAN)) {
        for (out, slot) in out.iter_mut().zip(spec::F32_SLOTS) {
            *out += sums[usize::from(slot)];
        }
    }
}
