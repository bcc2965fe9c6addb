//! Conversions between elements, f32, codes and activations.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2 and F16C")]

use core::arch::x86_64::*;

use bytemuck::must_cast;
use half::{bf16, f16};

use super::Avx2;
use super::codes::{codes_in_order, look_up_f32, look_up_u16, nearest_codes, pack_codes, u16_planes};
use super::registers::{load_f32, prefetch, store_f32, stream_f32};
use crate::format::CODEBOOK;
use crate::isa::simd::bits::{bits, bits_mut};
use crate::isa::simd::steps::{Decode, Floats, Lanes, Widen};
use crate::spec::SPAN;

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type Lanes = __m256;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(&self, lanes: &[f32; 8]) -> __m256 {
        load_f32(lanes)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn store(&self, out: &mut [f32; 8], lanes: __m256) {
        store_f32(out, lanes);
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_lanes(&self, lanes: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline(always)]
    fn prefetch<T>(&self, data: &[T], ahead: usize) {
        prefetch(data, ahead);
    }
}

impl Floats for Avx2 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn splat(&self, x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add(&self, a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn mul(&self, a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn max_abs(&self, largest: __m256, x: __m256) -> __m256 {
        let bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff));
        _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(largest), bits))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn largest_bits(&self, x: __m256) -> u32 {
        let x = _mm256_castps_si256(x);
        let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b0100_1110>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b1011_0001>(x));
        _mm_cvtsi128_si32(x).cast_unsigned()
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn encode(&self, weights: [__m256; 4], inverse: f32) -> [u8; 16] {
        let inverse = _mm256_set1_ps(inverse);
        must_cast(pack_codes(weights.map(|w| nearest_codes(_mm256_mul_ps(w, inverse)))))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn arrange_i16(&self, x: [__m256; 8], out: &mut [i16; SPAN]) {
        // Columns 16i..16i+16: the eight even ones in the low half, the odd ones in the high half.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
            let columns = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2 * i]), _mm256_cvtps_epi32(x[2 * i + 1]));
            let apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            let apart = _mm256_shuffle_epi8(columns, _mm256_broadcastsi128_si256(apart));
            _mm256_permutevar8x32_epi32(apart, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
        });
        *out = must_cast([
            _mm256_permute2x128_si256::<0x20>(a, c),
            _mm256_permute2x128_si256::<0x20>(b, d),
            _mm256_permute2x128_si256::<0x31>(a, c),
            _mm256_permute2x128_si256::<0x31>(b, d),
        ]);
    }
}

impl Widen<f32> for Avx2 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn widen(&self, x: &[f32; 8]) -> __m256 {
        load_f32(x)
    }
}

impl Widen<f16> for Avx2 {
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn widen(&self, x: &[f16; 8]) -> __m256 {
        _mm256_cvtph_ps(must_cast(*bits(x)))
    }
}

impl Widen<bf16> for Avx2 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn widen(&self, x: &[bf16; 8]) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(must_cast(*bits(x)))))
    }
}

impl Decode<f32> for Avx2 {
    /// The absmax: the weights are looked up and multiplied.
    type Book = __m256;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> __m256 {
        _mm256_set1_ps(absmax)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode(&self, absmax: &__m256, packed: &[u8; 16], out: &mut [f32; 32]) {
        let weights = look_up_f32(codes_in_order::<4>(packed), &self.f32_planes);
        *out = must_cast(weights.map(|w| _mm256_mul_ps(w, *absmax)));
    }
}

/// As [`Avx2`], but decodes past the caches. Whoever makes one runs an `sfence` before anything else uses the weights.
pub(super) struct Streaming(pub(super) Avx2);

impl Decode<f32> for Streaming {
    type Book = __m256;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> __m256 {
        _mm256_set1_ps(absmax)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode(&self, absmax: &__m256, packed: &[u8; 16], out: &mut [f32; 32]) {
        let weights = look_up_f32(codes_in_order::<4>(packed), &self.0.f32_planes);
        for (out, w) in out.as_chunks_mut().0.iter_mut().zip(weights) {
            let w = _mm256_mul_ps(w, *absmax);
            // SAFETY: whoever made the `Streaming` has the fence.
            unsafe { stream_f32(out, w) };
        }
    }
}

impl Decode<f16> for Avx2 {
    /// The bytes of the sixteen products, which are rounded once for the block.
    type Book = [__m256i; 2];

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> [__m256i; 2] {
        let (book, absmax) = (CODEBOOK.as_chunks().0, _mm256_set1_ps(absmax));
        let round = |x| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_mul_ps(load_f32(x), absmax));
        u16_planes(_mm256_set_m128i(round(&book[1]), round(&book[0])))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode(&self, book: &[__m256i; 2], packed: &[u8; 16], out: &mut [f16; 32]) {
        *bits_mut(out) = must_cast(look_up_u16(codes_in_order::<8>(packed), book));
    }
}

impl Decode<bf16> for Avx2 {
    /// As for f16.
    type Book = [__m256i; 2];

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> [__m256i; 2] {
        // Packing takes four from each half in turn.
        const C: [f32; 16] = CODEBOOK;
        const FIRST: [f32; 8] = [C[0], C[1], C[2], C[3], C[8], C[9], C[10], C[11]];
        const SECOND: [f32; 8] = [C[4], C[5], C[6], C[7], C[12], C[13], C[14], C[15]];
        let absmax = _mm256_set1_ps(absmax);
        let round = |x| round_bf16(_mm256_mul_ps(load_f32(x), absmax));
        u16_planes(_mm256_packus_epi32(round(&FIRST), round(&SECOND)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode(&self, book: &[__m256i; 2], packed: &[u8; 16], out: &mut [bf16; 32]) {
        *bits_mut(out) = must_cast(look_up_u16(codes_in_order::<8>(packed), book));
    }
}

/// Eight f32 to bf16 in 32-bit lanes, nearest even, NaN excluded.
#[target_feature(enable = "avx2")]
#[inline]
fn round_bf16(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    _mm256_srli_epi32::<16>(rounded)
}
