//! The steps of the 16x4 products of a few vectors: a row at a time, in registers of 256 bits.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX-512 and its VNNI")]

use core::arch::x86_64::*;

use super::Avx512;
use super::codes::look_up_columns;
use super::registers::add_products_256;
use crate::activations::Activations;
use crate::isa::avx2::{Avx2, broadcast, prefetch, spread_products};
use crate::isa::simd::batch_16x4;
use crate::isa::simd::steps::{Lanes, Steps};
use crate::isa::simd::steps_16x4::Steps16x4;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

impl<const WORDS: bool> Lanes for Avx512<WORDS> {
    type Lanes = __m256;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(&self, lanes: &[f32; 8]) -> __m256 {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { self.avx2.load(lanes) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn store(&self, out: &mut [f32; 8], lanes: __m256) {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { self.avx2.store(out, lanes) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_lanes(&self, lanes: __m256) -> f32 {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { self.avx2.add_lanes(lanes) }
    }

    #[inline(always)]
    fn prefetch<T>(&self, data: &[T], ahead: usize) {
        prefetch(data, ahead);
    }
}

impl<const WORDS: bool> Steps16x4 for Avx512<WORDS> {
    const VECTORS: usize = 8;

    type Span = <Avx2 as Steps16x4>::Span;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load_span(&self, values: &[i16; SPAN]) -> Self::Span {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { self.avx2.load_span(values) }
    }

    #[target_feature(enable = "avx2,avx512bw,avx512vl")]
    #[inline]
    unsafe fn decode_span(&self, packed: &[u8; SPAN / 2]) -> Self::Span {
        if WORDS {
            look_up_columns(packed, self.i16_book)
        } else {
            // SAFETY: the caller's CPU has AVX2.
            unsafe { self.avx2.decode_span(packed) }
        }
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add_span<const GROUPS: usize>(
        &self,
        lanes: __m256,
        weights: Self::Span,
        values: Self::Span,
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> __m256 {
        let sums = _mm256_cvtepi32_ps(sums_of_span(weights, values));
        _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread_products(absmax, scales)))
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add_products<const GROUPS: usize>(
        &self,
        lanes: __m256,
        weights: Self::Span,
        values: Self::Span,
        factors: &[f32; GROUPS],
    ) -> __m256 {
        let sums = _mm256_cvtepi32_ps(sums_of_span(weights, values));
        _mm256_add_ps(lanes, _mm256_mul_ps(sums, broadcast(factors)))
    }

    #[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn few_vectors<const GROUPS: usize, const N: usize>(
        steps: &Steps<Self>,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        batch_16x4::few_vectors::<Self, GROUPS, N>(steps, matrix, activations, first, out);
    }
}

/// The eight exact lane sums of the products of a span. Two sums at once: one alone, an instruction less, waits for each
/// product, and one vector was 0.94 times as fast on Zen 4.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn sums_of_span([a, b, c, d]: [__m256i; 4], [e, f, g, h]: [__m256i; 4]) -> __m256i {
    let even = add_products_256(_mm256_madd_epi16(a, e), b, f);
    let odd = add_products_256(_mm256_madd_epi16(c, g), d, h);
    _mm256_add_epi32(even, odd)
}
