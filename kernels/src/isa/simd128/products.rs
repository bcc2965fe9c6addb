//! The steps of the 16x4 products.

use core::arch::wasm32::*;

use super::dequantize::{look_up_u16, split_codes};
use super::vector::*;
use crate::activations::SPAN;

/// Adds the products of a span and `N` vectors to their lanes.
#[inline]
pub(super) fn add_span<const GROUPS: usize, const N: usize>(
    planes: &[v128; 2],
    mut lanes: [F32x8; N],
    packed: &[u8; SPAN / 2],
    values: &[[i16; SPAN]; N],
    absmax: &[f32; GROUPS],
    scales: &[[f32; GROUPS]; N],
) -> [F32x8; N] {
    let weights = decode_span(packed, planes);
    for ((lanes, values), scales) in lanes.iter_mut().zip(values).zip(scales) {
        let [low, high] = sums_of_span(weights, load_span(values));
        let sums = [f32x4_convert_i32x4(low), f32x4_convert_i32x4(high)];
        let factors = spread::<GROUPS>(&core::array::from_fn(|g| absmax[g] * scales[g]));
        *lanes = sum(*lanes, product(sums, factors));
    }
    lanes
}

/// The eight exact lane sums of the products of a span; see the top of the module.
#[inline]
fn sums_of_span(w: [v128; 8], q: [v128; 8]) -> [v128; 2] {
    let dot = |i: usize| i32x4_dot_i16x8(w[i], q[i]);
    let half = |i: usize| i32x4_add(i32x4_add(dot(i), dot(i + 2)), i32x4_add(dot(i + 4), dot(i + 6)));
    [half(0), half(1)]
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[inline]
fn decode_span(packed: &[u8; SPAN / 2], planes: &[v128; 2]) -> [v128; 8] {
    let mut weights = [i16x8_splat(0); 8];
    for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
        for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
            let [first, second] = look_up_u16(codes, planes);
            weights[4 * odd + half] = first;
            weights[4 * odd + half + 2] = second;
        }
    }
    weights
}

/// 64 weights or activations.
#[inline]
fn load_span(values: &[i16; SPAN]) -> [v128; 8] {
    let mut out = [i16x8_splat(0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_i16(values);
    }
    out
}
