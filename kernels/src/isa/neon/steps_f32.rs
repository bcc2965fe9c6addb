//! The steps of the f32 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::codes::{look_up_f32, split_codes};
use super::registers::{F32x8, add, load_f32, load_f32x4, mul, spread, store_f32, store_f32x4};
use super::{Neon, even_and_odd};
use crate::isa::simd::steps_f32::{DECODED_SPANS, DecodedRow, StepsF32};
use crate::spec::SPAN;

/// Columns of half a span: 16 packed bytes, and half of the lanes.
const HALF: usize = SPAN / 2;

impl StepsF32 for Neon {
    // With four rows the compiler runs out of registers.
    const ROWS: usize = 2;
    /// [`crate::spec::F32_SLOTS`] with four lanes at a time.
    const SLOTS: [u8; SPAN] = even_and_odd();

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
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

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> F32x8 {
        let mut sums = [vdupq_n_f32(0.0); 2];
        for ((sums, bytes), x) in sums.iter_mut().zip(packed.as_chunks().0).zip(inputs.as_chunks::<HALF>().0) {
            *sums = add_products_f32(decode_half_f32(bytes, &self.f32_planes), must_cast(*x));
        }
        add(lanes, mul(sums, spread(absmax)))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
        for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<HALF>().0) {
            for (out, w) in out.as_chunks_mut().0.iter_mut().zip(decode_half_f32(bytes, &self.f32_planes)) {
                store_f32x4(out, w);
            }
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    ) {
        for (half, sums) in sums.as_chunks_mut::<HALF>().0.iter_mut().enumerate() {
            let codes = packed.map(|packed| split_codes(&packed.as_chunks().0[half]));
            for (odd, sums) in sums.as_chunks_mut::<{ HALF / 2 }>().0.iter_mut().enumerate() {
                let scaled = |row: usize| {
                    let [a, b, c, d] = look_up_f32(codes[row][odd], &self.f32_planes);
                    let factor = [vdupq_n_f32(factors[row][half * GROUPS / 2]); 2];
                    [mul([a, b], factor), mul([c, d], factor)]
                };
                let pair = |a: [F32x8; 2], b: [F32x8; 2]| [add(a[0], b[0]), add(a[1], b[1])];
                let fours = pair(pair(scaled(0), scaled(1)), pair(scaled(2), scaled(3)));
                for (sums, four) in sums.as_chunks_mut().0.iter_mut().zip(fours) {
                    let total = add(load_f32(sums), four);
                    store_f32(sums, total);
                }
            }
        }
    }

    /// The two halves of the lanes take turns: both at once, the compiler runs out of registers.
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
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
                let x: [float32x4_t; 8] = must_cast(x.as_chunks::<HALF>().0[half]);
                for (total, row) in totals.iter_mut().zip(rows) {
                    let w = must_cast(row.weights[s].as_chunks::<HALF>().0[half]);
                    let absmax = spread(&row.absmax[s])[half];
                    *total = vaddq_f32(*total, vmulq_f32(add_products_f32(w, x), absmax));
                }
            }
            for (lanes, total) in lanes.iter_mut().zip(totals) {
                store_f32x4(&mut lanes.as_chunks_mut().0[half], total);
            }
        }
    }
}

/// The weights of half a span, without absmax, in order: place by place for half of the lanes.
#[target_feature(enable = "neon")]
#[inline]
fn decode_half_f32(bytes: &[u8; 16], planes: &[uint8x16_t; 4]) -> [float32x4_t; 8] {
    let [even, odd] = split_codes(bytes);
    let ([a, b, c, d], [e, f, g, h]) = (look_up_f32(even, planes), look_up_f32(odd, planes));
    [a, b, c, d, e, f, g, h]
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
