//! The f32 product.

use core::arch::aarch64::*;

use super::dequantize::{f32_planes, look_up_f32, split_codes};
use super::vector::*;
use crate::activations::SPAN;
use crate::format::canonical;
use crate::isa::products::AHEAD;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;
use crate::spec;

/// Columns of half a span: 16 packed bytes, and half of the lanes.
pub(super) const HALF: usize = SPAN / 2;

/// Spans that share one look at the scales. No more than eight, so that decoding nested absmax hides behind the vector
/// work of the spans before.
const STRIDE: usize = 8;

/// The f32 product.
#[target_feature(enable = "neon")]
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

/// Puts inputs, a whole number of half spans, into the order in which their packed bytes are decoded: of each half
/// first the even columns, then the odd ones. That is [`spec::F32_SLOTS`] with four lanes at a time. Zeros follow the
/// last.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn arrange_f32(inputs: &[f32], panel: &mut [f32]) {
    let (panel, padding) = panel.split_at_mut(inputs.len());
    for (inputs, panel) in inputs.as_chunks::<HALF>().0.iter().zip(panel.as_chunks_mut::<HALF>().0) {
        let (even, odd) = panel.split_at_mut(HALF / 2);
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for (x, (even, odd)) in inputs.as_chunks().0.iter().zip(places) {
            let [a, b] = load_f32(x);
            store_f32x4(even, vuzp1q_f32(a, b));
            store_f32x4(odd, vuzp2q_f32(a, b));
        }
    }
    padding.fill(0.0);
}

/// Adds the product of panel `p` of a row-aligned matrix, `cols` columns, with `GROUPS` blocks in a span of 64 columns
/// at most; `SCALES` is `GROUPS * STRIDE`.
#[target_feature(enable = "neon")]
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
        let mut lanes = [vdupq_n_f32(0.0); 2];
        let mut group = first_group;
        for (packed, inputs) in packed.iter().zip(inputs) {
            let absmax = matrix.group_absmax::<SCALES>(first_block, group);
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
#[target_feature(enable = "neon")]
#[inline]
fn add_spans_f32<const GROUPS: usize>(
    mut lanes: F32x8,
    packed: &[u8],
    inputs: &[f32],
    absmax: &[f32],
    planes: &[uint8x16_t; 4],
    ahead: usize,
) -> F32x8 {
    let spans = packed.as_chunks::<{ SPAN / 2 }>().0.iter().zip(inputs.as_chunks::<SPAN>().0);
    for ((packed, x), absmax) in spans.zip(absmax.as_chunks::<GROUPS>().0) {
        prefetch(packed, ahead);
        let mut sums = [vdupq_n_f32(0.0); 2];
        for ((sums, bytes), x) in sums.iter_mut().zip(packed.as_chunks().0).zip(x.as_chunks().0) {
            *sums = add_products_f32(decode_half_f32(bytes, planes), load_half_f32(x));
        }
        lanes = sum(lanes, product(sums, spread(absmax)));
    }
    lanes
}

/// The weights of half a span, without absmax, in the order of [`arrange_f32`]: place by place for half of the lanes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn decode_half_f32(bytes: &[u8; 16], planes: &[uint8x16_t; 4]) -> [float32x4_t; 8] {
    let [even, odd] = split_codes(bytes);
    let ([a, b, c, d], [e, f, g, h]) = (look_up_f32(even, planes), look_up_f32(odd, planes));
    [a, b, c, d, e, f, g, h]
}

/// Half a span of weights or inputs.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_half_f32(values: &[f32; HALF]) -> [float32x4_t; 8] {
    let mut out = [vdupq_n_f32(0.0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_f32x4(values);
    }
    out
}

/// [`spec::add_places`] of the products of weights and inputs, for half of the lanes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_products_f32(w: [float32x4_t; 8], x: [float32x4_t; 8]) -> float32x4_t {
    let place = |i: usize| vmulq_f32(w[i], x[i]);
    let even = vaddq_f32(vaddq_f32(place(0), place(1)), vaddq_f32(place(2), place(3)));
    let odd = vaddq_f32(vaddq_f32(place(4), place(5)), vaddq_f32(place(6), place(7)));
    vaddq_f32(even, odd)
}
