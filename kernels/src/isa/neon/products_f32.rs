//! The steps of the f32 products.

use core::arch::aarch64::*;

use super::dequantize::{look_up_f32, split_codes};
use super::vector::*;
use crate::activations::SPAN;
use crate::isa::steps::{DECODED_SPANS, DecodedRow};

/// Columns of half a span: 16 packed bytes, and half of the lanes.
pub(super) const HALF: usize = SPAN / 2;

/// Puts the inputs of a span into the order in which its packed bytes are decoded: of each half first the even columns, then
/// the odd ones. That is [`crate::spec::F32_SLOTS`] with four lanes at a time.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn arrange(inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
    for (inputs, out) in inputs.as_chunks::<HALF>().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
        let (even, odd) = out.split_at_mut(HALF / 2);
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for (x, (even, odd)) in inputs.as_chunks().0.iter().zip(places) {
            let [a, b] = load_f32(x);
            store_f32x4(even, vuzp1q_f32(a, b));
            store_f32x4(odd, vuzp2q_f32(a, b));
        }
    }
}

/// Adds the products of a span to the lanes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_span_f32<const GROUPS: usize>(
    planes: &[uint8x16_t; 4],
    lanes: F32x8,
    packed: &[u8; SPAN / 2],
    inputs: &[f32; SPAN],
    absmax: &[f32; GROUPS],
) -> F32x8 {
    let mut sums = [vdupq_n_f32(0.0); 2];
    for ((sums, bytes), x) in sums.iter_mut().zip(packed.as_chunks().0).zip(inputs.as_chunks().0) {
        *sums = add_products_f32(decode_half_f32(bytes, planes), load_half_f32(x));
    }
    sum(lanes, product(sums, spread(absmax)))
}

/// The weights of a span, without absmax, in the order of [`arrange`].
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn decode_f32(planes: &[uint8x16_t; 4], packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
    for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
        for (out, w) in out.as_chunks_mut().0.iter_mut().zip(decode_half_f32(bytes, planes)) {
            store_f32x4(out, w);
        }
    }
}

/// The weights of half a span, without absmax, in the order of [`arrange`]: place by place for half of the lanes.
#[target_feature(enable = "neon")]
#[inline]
fn decode_half_f32(bytes: &[u8; 16], planes: &[uint8x16_t; 4]) -> [float32x4_t; 8] {
    let [even, odd] = split_codes(bytes);
    let ([a, b, c, d], [e, f, g, h]) = (look_up_f32(even, planes), look_up_f32(odd, planes));
    [a, b, c, d, e, f, g, h]
}

/// Half a span of weights or inputs.
#[target_feature(enable = "neon")]
#[inline]
fn load_half_f32(values: &[f32; HALF]) -> [float32x4_t; 8] {
    let mut out = [vdupq_n_f32(0.0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_f32x4(values);
    }
    out
}

/// [`crate::spec::add_places`] of the products of weights and inputs, for half of the lanes.
#[target_feature(enable = "neon")]
#[inline]
fn add_products_f32(w: [float32x4_t; 8], x: [float32x4_t; 8]) -> float32x4_t {
    let place = |i: usize| vmulq_f32(w[i], x[i]);
    let even = vaddq_f32(vaddq_f32(place(0), place(1)), vaddq_f32(place(2), place(3)));
    let odd = vaddq_f32(vaddq_f32(place(4), place(5)), vaddq_f32(place(6), place(7)));
    vaddq_f32(even, odd)
}

/// Adds the products of `R` rows, which share the loads of the inputs, and a vector in a tile to their lanes. The two
/// halves of the lanes take turns: both at once, the compiler runs out of registers.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_rows<const GROUPS: usize, const R: usize>(
    rows: &[DecodedRow<GROUPS>; R],
    inputs: &[[f32; SPAN]],
    lanes: &mut [[f32; 8]; R],
) {
    for half in 0..2 {
        let mut totals = [vdupq_n_f32(0.0); R];
        for (total, lanes) in totals.iter_mut().zip(lanes.iter()) {
            *total = load_f32x4(&lanes.as_chunks().0[half]);
        }
        for (s, x) in inputs.iter().enumerate().take(DECODED_SPANS) {
            let x = load_half_f32(&x.as_chunks().0[half]);
            for (total, row) in totals.iter_mut().zip(rows) {
                let w = load_half_f32(&row.weights[s].as_chunks().0[half]);
                let absmax = spread(&row.absmax[s])[half];
                *total = vaddq_f32(*total, vmulq_f32(add_products_f32(w, x), absmax));
            }
        }
        for (lanes, total) in lanes.iter_mut().zip(totals) {
            store_f32x4(&mut lanes.as_chunks_mut().0[half], total);
        }
    }
}
