//! The steps of the f32 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, here too, where the target has what they need")]

use core::arch::wasm32::*;

use super::Simd128;
use super::codes::{look_up_f32, split_codes};
use super::registers::{F32x8, add, load_f32, load_f32x4, mul, spread, store_f32, store_f32x4};
use crate::isa::simd::steps_f32::{DECODED_SPANS, DecodedRow, StepsF32};
use crate::spec::{F32_SLOTS, SPAN};

impl StepsF32 for Simd128 {
    const ROWS: usize = 2;
    const SLOTS: [u8; SPAN] = F32_SLOTS;

    #[inline]
    unsafe fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
        let ((first, second), (even, odd)) = (inputs.split_at(SPAN / 2), out.split_at_mut(SPAN / 2));
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for ((a, b), (even, odd)) in first.as_chunks().0.iter().zip(second.as_chunks().0).zip(places) {
            let ([a, b], [c, d]) = (load_f32(a), load_f32(b));
            store_f32(even, [i32x4_shuffle::<0, 2, 4, 6>(a, b), i32x4_shuffle::<0, 2, 4, 6>(c, d)]);
            store_f32(odd, [i32x4_shuffle::<1, 3, 5, 7>(a, b), i32x4_shuffle::<1, 3, 5, 7>(c, d)]);
        }
    }

    #[inline]
    unsafe fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> F32x8 {
        let ((halves, _), (x, _)) = (packed.as_chunks(), inputs.as_chunks());
        let ([even_0, odd_0], [even_1, odd_1]) = (split_codes(&halves[0]), split_codes(&halves[1]));
        let sums =
            add(dot_32([even_0, even_1], &x[0], &self.f32_planes), dot_32([odd_0, odd_1], &x[1], &self.f32_planes));
        add(lanes, mul(sums, spread(absmax)))
    }

    #[inline]
    unsafe fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
        let (vectors, _) = out.as_chunks_mut();
        for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
            for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
                for (i, w) in look_up_f32(codes, &self.f32_planes).into_iter().enumerate() {
                    store_f32x4(&mut vectors[2 * (4 * odd + i) + half], w);
                }
            }
        }
    }

    #[inline]
    unsafe fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    ) {
        let (sums, _) = sums.as_chunks_mut::<4>();
        let codes = packed.map(|packed| {
            let (halves, _) = packed.as_chunks();
            let ([even_0, odd_0], [even_1, odd_1]) = (split_codes(&halves[0]), split_codes(&halves[1]));
            [even_0, even_1, odd_0, odd_1]
        });
        for i in 0..4 {
            let mut scaled = [[f32x4_splat(0.0); 4]; 4];
            for ((scaled, codes), factors) in scaled.iter_mut().zip(&codes).zip(factors) {
                let factor = spread(factors)[i % 2];
                *scaled = look_up_f32(codes[i], &self.f32_planes);
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

    #[inline]
    unsafe fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
        rows: &[DecodedRow<GROUPS>; R],
        inputs: &[[f32; SPAN]],
        lanes: &mut [[f32; 8]; R],
    ) {
        let mut totals = [[f32x4_splat(0.0); 2]; R];
        for (total, lanes) in totals.iter_mut().zip(lanes.iter()) {
            *total = load_f32(lanes);
        }
        for (s, x) in inputs.iter().enumerate().take(DECODED_SPANS) {
            let mut vectors = [[f32x4_splat(0.0); 2]; 8];
            for (vector, x) in vectors.iter_mut().zip(x.as_chunks().0) {
                *vector = load_f32(x);
            }
            for (total, row) in totals.iter_mut().zip(rows) {
                let (w, _) = row.weights[s].as_chunks();
                let place = |j: usize| mul(vectors[j], load_f32(&w[j]));
                let first = add(add(place(0), place(1)), add(place(2), place(3)));
                let second = add(add(place(4), place(5)), add(place(6), place(7)));
                let absmax = spread(&row.absmax[s]);
                *total = add(*total, mul(add(first, second), absmax));
            }
        }
        for (lanes, total) in lanes.iter_mut().zip(totals) {
            store_f32(lanes, total);
        }
    }
}

/// Lane sums of the products of 32 codes.
#[inline]
fn dot_32(codes: [v128; 2], x: &[f32; 32], planes: &[v128; 4]) -> F32x8 {
    let (first, second) = (look_up_f32(codes[0], planes), look_up_f32(codes[1], planes));
    let (x, _) = x.as_chunks();
    let place = |i: usize| mul([first[i], second[i]], load_f32(&x[i]));
    add(add(place(0), place(1)), add(place(2), place(3)))
}
