//! The f32 product.

use core::arch::x86_64::*;

use super::dequantize::{f32_planes, look_up_f32, split_codes};
use super::vector::*;
use crate::activations::SPAN;
use crate::format::canonical;
use crate::isa::products::AHEAD;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Spans that share one look at the scales. No more than eight, so that decoding nested absmax hides behind the vector
/// work of the spans before.
const STRIDE: usize = 8;

/// The f32 product.
#[target_feature(enable = "avx2")]
pub(super) fn gemv_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    if !matrix.is_row_aligned() {
        return scalar::gemv_f32(matrix, inputs, out);
    }
    out.fill(0.0);
    let mut panel = [0.0; spec::PANEL];
    for (p, inputs) in inputs.chunks(spec::PANEL).enumerate() {
        let panel = &mut panel[..inputs.len().next_multiple_of(SPAN)];
        arrange_f32(inputs, panel);
        if matrix.block_size().group() == SPAN {
            gemv_f32_panel::<1, STRIDE>(matrix, p, inputs.len(), panel, out);
        } else {
            gemv_f32_panel::<2, { 2 * STRIDE }>(matrix, p, inputs.len(), panel, out);
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Puts inputs into the order of [`spec::F32_SLOTS`], with zeros after the last.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn arrange_f32(inputs: &[f32], panel: &mut [f32]) {
    let (spans, rest) = inputs.as_chunks::<SPAN>();
    let (panel, _) = panel.as_chunks_mut::<SPAN>();
    for (inputs, panel) in spans.iter().zip(&mut *panel) {
        arrange_span(inputs, panel);
    }
    if let ([_, ..], Some(panel)) = (rest, panel.last_mut()) {
        let mut padded = [0.0; SPAN];
        padded[..rest.len()].copy_from_slice(rest);
        arrange_span(&padded, panel);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn arrange_span(inputs: &[f32; SPAN], panel: &mut [f32; SPAN]) {
    let ((first, second), (even, odd)) = (inputs.split_at(SPAN / 2), panel.split_at_mut(SPAN / 2));
    let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
    for ((a, b), (even, odd)) in first.as_chunks().0.iter().zip(second.as_chunks().0).zip(places) {
        let (a, b) = (load_f32(a), load_f32(b));
        let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        store_f32(even, _mm256_shuffle_ps::<0b10_00_10_00>(low, high));
        store_f32(odd, _mm256_shuffle_ps::<0b11_01_11_01>(low, high));
    }
}

/// Adds the product of panel `p` of a row-aligned matrix, `cols` columns, with `GROUPS` blocks in a span of 64 columns
/// at most; `SCALES` is `GROUPS * STRIDE`.
#[target_feature(enable = "avx2")]
fn gemv_f32_panel<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    p: usize,
    cols: usize,
    inputs: &[f32],
    out: &mut [f32],
) {
    let planes = f32_planes();
    // What comes next: the part of the next row, if a row has several.
    let ahead = (matrix.cols() / 2).max(AHEAD);
    let first_group = p * (spec::PANEL / SPAN * GROUPS);
    // Cut where the packed bytes are: a last half span is padded here, and may fill a stride that those do not.
    let (inputs, inputs_rest) = inputs.split_at(cols - cols % (STRIDE * SPAN));
    let (inputs, _) = inputs.as_chunks::<{ STRIDE * SPAN }>();
    for (row, out) in out.iter_mut().enumerate() {
        let (packed, first_block) = matrix.aligned_row(row);
        let (packed, packed_rest) = packed[p * spec::PANEL / 2..][..cols / 2].as_chunks::<{ STRIDE * SPAN / 2 }>();
        let mut lanes = _mm256_setzero_ps();
        let mut group = first_group;
        for (packed, inputs) in packed.iter().zip(inputs) {
            let absmax = core::hint::black_box(matrix.group_absmax::<SCALES>(first_block, group));
            lanes = add_spans_f32::<GROUPS>(lanes, packed, inputs, &absmax, &planes, ahead);
            group += SCALES;
        }
        if !packed_rest.is_empty() {
            let mut absmax = [0.0; SCALES];
            let groups = packed_rest.len() / (SPAN / 2 / GROUPS);
            matrix.group_absmax_rest(first_block, group, &mut absmax[..groups]);
            lanes = add_spans_f32::<GROUPS>(lanes, packed_rest, inputs_rest, &absmax, &planes, ahead);
            if let (half, [.., inputs]) = (packed_rest.as_chunks::<{ SPAN / 2 }>().1, inputs_rest.as_chunks::<SPAN>().0)
                && !half.is_empty()
            {
                // The other half of the span has inputs and an absmax of 0, which change no lane.
                let mut packed = [0; SPAN / 2];
                packed[..half.len()].copy_from_slice(half);
                lanes = add_spans_f32::<GROUPS>(lanes, &packed, inputs, &[absmax[groups - 1], 0.0], &planes, ahead);
            }
        }
        *out += add_lanes(lanes);
    }
}

/// Adds spans, as many as there are inputs for, to the lanes, and asks for the bytes that are so far ahead.
#[target_feature(enable = "avx2")]
#[inline]
fn add_spans_f32<const GROUPS: usize>(
    mut lanes: __m256,
    packed: &[u8],
    inputs: &[f32],
    absmax: &[f32],
    planes: &[__m256i; 4],
    ahead: usize,
) -> __m256 {
    let spans = packed.as_chunks().0.iter().zip(inputs.as_chunks::<SPAN>().0).zip(absmax.as_chunks::<GROUPS>().0);
    for ((packed, x), absmax) in spans {
        prefetch(packed, ahead);
        let ([even, odd], (x, _)) = (split_codes(packed), x.as_chunks());
        let sums = _mm256_add_ps(dot_32(even, &x[0], planes), dot_32(odd, &x[1], planes));
        lanes = _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread(absmax)));
    }
    lanes
}

/// Lane sums of the products of 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_32(codes: __m256i, x: &[f32; 32], planes: &[__m256i; 4]) -> __m256 {
    let [a, b, c, d] = look_up_f32(codes, planes);
    let (x, _) = x.as_chunks();
    let ab = _mm256_add_ps(_mm256_mul_ps(a, load_f32(&x[0])), _mm256_mul_ps(b, load_f32(&x[1])));
    let cd = _mm256_add_ps(_mm256_mul_ps(c, load_f32(&x[2])), _mm256_mul_ps(d, load_f32(&x[3])));
    _mm256_add_ps(ab, cd)
}
