//! The steps of the transposed 16x4 product: sixteen columns in a register, of two rows.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX-512 and its VNNI")]

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::Avx512;
use super::registers::{add_products, load_f32};
use crate::format::CODEBOOK;
use crate::gradients::Gradients;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_transposed_16x4::{IntegerColumns, Near, RowPair};
use crate::isa::simd::transposed_16x4;
use crate::spec::{HALF_SPAN, SPAN};

impl IntegerColumns for Avx512 {
    type Sums = __m512i;
    type Weights = __m512i;
    type Pair = __m512i;
    /// The first row's and then the second's, as words, of which a look-up takes one by five bits.
    type Books = __m512i;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn books(&self, factors: [f32; 2]) -> __m512i {
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(book(factors[0])), book(factors[1]))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn decode_pair(&self, books: &__m512i, packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair) {
        let (a, b) = (must_cast(*packed[0]), must_cast(*packed[1]));
        let (low, high) = (_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b));
        *out = must_cast([_mm512_permutexvar_epi16(codes(low), *books), _mm512_permutexvar_epi16(codes(high), *books)]);
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn no_sums(&self) -> __m512i {
        _mm512_setzero_si512()
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load_weights(&self, rows: &RowPair, register: usize) -> __m512i {
        must_cast(rows.as_chunks::<32>().0[register])
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn splat_pair(&self, values: &[i16; 2]) -> __m512i {
        _mm512_set1_epi32(must_cast(*values))
    }

    #[target_feature(enable = "avx512vnni")]
    #[inline]
    unsafe fn add_products(&self, sums: __m512i, weights: __m512i, values: __m512i) -> __m512i {
        add_products(sums, weights, values)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn sums_to_f32(&self, sums: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(sums)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn add_vectors<const N: usize>(
        steps: &Steps<Self>,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    ) {
        transposed_16x4::add_vectors::<Self, N, 2>(steps, near, gradients, first, sums);
    }
}

/// The codes of sixteen columns of two rows, whose bytes are given in turn, as words; those of the second row larger by 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn codes(bytes: __m128i) -> __m512i {
    let bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), must_cast(COLUMNS));
    let words = _mm512_srlv_epi16(bytes, _mm512_set1_epi64(0x0004_0004));
    let (nibble, second) = (_mm512_set1_epi16(15), _mm512_set1_epi32(16 << 16));
    // words & nibble | second
    _mm512_ternarylogic_epi32::<0b1110_1010>(words, nibble, second)
}

/// The codebook times a factor, rounded.
#[target_feature(enable = "avx512f")]
#[inline]
fn book(factor: f32) -> __m256i {
    _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(load_f32(&CODEBOOK), _mm512_set1_ps(factor))))
}

/// Where bytes of two rows in turn go: as words, and twice, for the two columns of a byte. 128 bits have four columns.
const COLUMNS: [[u8; 16]; 4] = {
    let mut from = [[0x80; 16]; 4];
    let mut i = 0;
    while i < 32 {
        let (part, column, row) = (i / 8, i / 2 % 4, i % 2);
        #[allow(clippy::cast_possible_truncation, reason = "a byte of sixteen")]
        {
            from[part][4 * column + 2 * row] = (4 * part + column / 2 * 2 + row) as u8;
        }
        i += 1;
    }
    from
};
