//! The f32 product with the transposed matrix.
//!
//! Four rows at a time are decoded, multiplied by the product of absmax and input, and added to the sums of their
//! columns, which stay on the stack in decode order for a panel of columns and a chunk of rows.

use core::arch::x86_64::*;

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
#[target_feature(enable = "avx2")]
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
#[target_feature(enable = "avx2")]
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
                let rows = [0, 1, 2, 3].map(|i| matrix.aligned_row(if i < inputs.len() { row + i } else { row }));
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
                    let factors = core::hint::black_box(factors);
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
#[target_feature(enable = "avx2")]
#[inline]
fn add_rows<const GROUPS: usize, const SCALES: usize>(
    packed: [&[u8]; 4],
    factors: &[[f32; SCALES]; 4],
    sums: &mut [[f32; SPAN]],
    planes: &[__m256i; 4],
) {
    for (s, sums) in sums.iter_mut().enumerate() {
        let factor = |row: usize| spread::<GROUPS>(&factors[row].as_chunks().0[s]);
        let codes = packed.map(|packed| {
            let packed = &packed[s * SPAN / 2..];
            match packed.first_chunk() {
                Some(packed) => split_codes(packed),
                None => {
                    let mut padded = [0; SPAN / 2];
                    padded[..packed.len()].copy_from_slice(packed);
                    split_codes(&padded)
                }
            }
        });
        let (evens, odds) = sums.as_chunks_mut().0.split_at_mut(4);
        for (half, sums) in [evens, odds].into_iter().enumerate() {
            let scaled = |row: usize| {
                let factor = factor(row);
                look_up_f32(codes[row][half], planes).map(|w| _mm256_mul_ps(w, factor))
            };
            let pair =
                |a: [__m256; 4], b: [__m256; 4]| -> [__m256; 4] { [0, 1, 2, 3].map(|j| _mm256_add_ps(a[j], b[j])) };
            let four = pair(pair(scaled(0), scaled(1)), pair(scaled(2), scaled(3)));
            for (sum, four) in sums.iter_mut().zip(four) {
                let total = _mm256_add_ps(load_f32(sum), four);
                store_f32(sum, total);
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
