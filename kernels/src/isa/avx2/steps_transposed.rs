//! The steps of the transposed 16x4 product: eight columns in a register, of two rows.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::Avx2;
use super::codes::{codes_in_order, look_up_u16, u16_planes};
use super::registers::load_f32;
use crate::format::CODEBOOK;
use crate::gradients::Gradients;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_transposed_16x4::{IntegerColumns, Near, RowPair};
use crate::isa::simd::transposed_16x4;
use crate::spec::{HALF_SPAN, SPAN};

impl IntegerColumns for Avx2 {
    type Sums = __m256i;
    type Weights = __m256i;
    type Pair = __m256i;
    /// Low and high bytes of each.
    type Books = [[__m256i; 2]; 2];

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn books(&self, factors: [f32; 2]) -> [[__m256i; 2]; 2] {
        [planes(_mm256_set1_ps(factors[0])), planes(_mm256_set1_ps(factors[1]))]
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode_pair(&self, books: &[[__m256i; 2]; 2], packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair) {
        let [a, b] = look_up_u16(codes_in_order::<4>(packed[0]), &books[0]);
        let [c, d] = look_up_u16(codes_in_order::<4>(packed[1]), &books[1]);
        *out = must_cast([
            _mm256_unpacklo_epi16(a, c),
            _mm256_unpackhi_epi16(a, c),
            _mm256_unpacklo_epi16(b, d),
            _mm256_unpackhi_epi16(b, d),
        ]);
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn no_sums(&self) -> __m256i {
        _mm256_setzero_si256()
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load_weights(&self, rows: &RowPair, register: usize) -> __m256i {
        must_cast(rows.as_chunks::<16>().0[register])
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn splat_pair(&self, values: &[i16; 2]) -> __m256i {
        _mm256_set1_epi32(must_cast(*values))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_products(&self, sums: __m256i, weights: __m256i, values: __m256i) -> __m256i {
        _mm256_add_epi32(sums, _mm256_madd_epi16(weights, values))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn sums_to_f32(&self, sums: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(sums)
    }

    #[target_feature(enable = "avx2")]
    #[inline(never)]
    unsafe fn add_vectors<const N: usize>(
        steps: &Steps<Self>,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    ) {
        if N == 4 {
            transposed_16x4::add_vectors::<Self, N, 2>(steps, near, gradients, first, sums);
        } else {
            transposed_16x4::add_vectors::<Self, N, 4>(steps, near, gradients, first, sums);
        }
    }
}

/// The bytes of the codebook times a factor, rounded.
#[target_feature(enable = "avx2")]
#[inline]
fn planes(factor: __m256) -> [__m256i; 2] {
    // In the order that packing within 128 bits puts right.
    const BOOK: [[f32; 8]; 2] = {
        let mut book = [[0.0; 8]; 2];
        let mut k = 0;
        while k < 16 {
            book[k / 4 % 2][k / 8 * 4 + k % 4] = CODEBOOK[k];
            k += 1;
        }
        book
    };
    let (a, b) = (_mm256_mul_ps(load_f32(&BOOK[0]), factor), _mm256_mul_ps(load_f32(&BOOK[1]), factor));
    u16_planes(_mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)))
}
