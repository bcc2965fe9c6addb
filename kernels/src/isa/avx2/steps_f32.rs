//! The steps of the f32 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;

use super::Avx2;
use super::codes::{look_up_f32, split_codes};
use super::registers::{broadcast, load_f32, spread, store_f32};
use crate::isa::simd::steps_f32::{DECODED_SPANS, DecodedRow, StepsF32};
use crate::spec::{F32_SLOTS, SPAN};

impl StepsF32 for Avx2 {
    const ROWS: usize = 4;
    const SLOTS: [u8; SPAN] = F32_SLOTS;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
        let ((first, second), (even, odd)) = (inputs.split_at(SPAN / 2), out.split_at_mut(SPAN / 2));
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for ((a, b), (even, odd)) in first.as_chunks().0.iter().zip(second.as_chunks().0).zip(places) {
            let (a, b) = (load_f32(a), load_f32(b));
            let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            store_f32(even, _mm256_shuffle_ps::<0b10_00_10_00>(low, high));
            store_f32(odd, _mm256_shuffle_ps::<0b11_01_11_01>(low, high));
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: __m256,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> __m256 {
        let ([even, odd], (x, _)) = (split_codes(packed), inputs.as_chunks());
        let sums = _mm256_add_ps(dot_32(even, &x[0], &self.f32_planes), dot_32(odd, &x[1], &self.f32_planes));
        _mm256_add_ps(lanes, _mm256_mul_ps(sums, broadcast(absmax)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
        let [even, odd] = split_codes(packed);
        let (vectors, _) = out.as_chunks_mut();
        let (evens, odds) = vectors.split_at_mut(4);
        for (out, codes) in [(evens, even), (odds, odd)] {
            for (out, w) in out.iter_mut().zip(look_up_f32(codes, &self.f32_planes)) {
                store_f32(out, w);
            }
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    ) {
        let codes = packed.map(|packed| split_codes(packed));
        let (evens, odds) = sums.as_chunks_mut().0.split_at_mut(4);
        for (half, sums) in [evens, odds].into_iter().enumerate() {
            let scaled = |row: usize| {
                let factor = if GROUPS == 1 { broadcast(factors[row]) } else { spread(factors[row]) };
                look_up_f32(codes[row][half], &self.f32_planes).map(|w| _mm256_mul_ps(w, factor))
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

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
        rows: &[DecodedRow<GROUPS>; R],
        inputs: &[[f32; SPAN]],
        lanes: &mut [[f32; 8]; R],
    ) {
        let mut totals = [_mm256_setzero_ps(); R];
        for (total, lanes) in totals.iter_mut().zip(lanes.iter()) {
            *total = load_f32(lanes);
        }
        for (s, x) in inputs.iter().enumerate().take(DECODED_SPANS) {
            let mut vectors = [_mm256_setzero_ps(); 8];
            for (vector, x) in vectors.iter_mut().zip(x.as_chunks().0) {
                *vector = load_f32(x);
            }
            for (total, row) in totals.iter_mut().zip(rows) {
                let (w, _) = row.weights[s].as_chunks();
                let product = |j: usize| _mm256_mul_ps(vectors[j], load_f32(&w[j]));
                let ab = _mm256_add_ps(product(0), product(1));
                let abcd = _mm256_add_ps(ab, _mm256_add_ps(product(2), product(3)));
                let ef = _mm256_add_ps(product(4), product(5));
                let sums = _mm256_add_ps(abcd, _mm256_add_ps(ef, _mm256_add_ps(product(6), product(7))));
                let absmax = spread(&row.absmax[s]);
                *total = _mm256_add_ps(*total, _mm256_mul_ps(sums, absmax));
            }
        }
        for (lanes, total) in lanes.iter_mut().zip(totals) {
            store_f32(lanes, total);
        }
    }
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
