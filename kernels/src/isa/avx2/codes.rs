//! Codes in bytes: apart and together, looked up, found and packed.

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::registers::load_f32;
use crate::format::THRESHOLDS;
use crate::isa::simd::planes::PLANES_F32;

/// The codes of the even and of the odd columns of a span of 64.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn split_codes(packed: &[u8; 32]) -> [__m256i; 2] {
    let (bytes, nibble) = (must_cast(*packed), _mm256_set1_epi8(15));
    [_mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble), _mm256_and_si256(bytes, nibble)]
}

/// The 32 codes of 16 packed bytes, one a byte. Runs of `RUN` codes (4 or 8) go to the two halves in turn, so that
/// unpacking what is looked up for them leaves whole registers in column order.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn codes_in_order<const RUN: usize>(packed: &[u8; 16]) -> __m256i {
    let twice = const {
        let mut from = [0_u8; 32];
        let mut i = 0;
        while i < 32 {
            let (half, place) = (i / 16, i % 16);
            let column = place / RUN * 2 * RUN + half * RUN + place % RUN;
            #[allow(clippy::cast_possible_truncation, reason = "column < 32")]
            {
                from[i] = (column / 2) as u8;
            }
            i += 1;
        }
        from
    };
    let packed = must_cast(*packed);
    let twice = _mm256_shuffle_epi8(_mm256_set_m128i(packed, packed), must_cast(twice));
    let even = _mm256_and_si256(_mm256_srli_epi16::<4>(twice), _mm256_set1_epi16(0x000f));
    _mm256_or_si256(even, _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00)))
}

/// The planes of the f32 codebook, each in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn f32_planes() -> [__m256i; 4] {
    PLANES_F32.map(|plane| _mm256_broadcastsi128_si256(must_cast(plane)))
}

/// Low and high bytes of sixteen 16-bit values, each in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn u16_planes(values: __m256i) -> [__m256i; 2] {
    let apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    let bytes = _mm256_shuffle_epi8(values, apart);
    [_mm256_permute4x64_epi64::<0b10_00_10_00>(bytes), _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes)]
}

/// The weights, without absmax, of 32 codes. Codes `4i..4i+4` of each half become the 32-bit lanes of result `i`: their
/// four bytes are looked up apart and brought together by two levels of unpacking.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn look_up_f32(codes: __m256i, planes: &[__m256i; 4]) -> [__m256; 4] {
    let [b0, b1, b2, b3] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    let (low, high) = (_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1));
    let (low_top, high_top) = (_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3));
    [
        _mm256_unpacklo_epi16(low, low_top),
        _mm256_unpackhi_epi16(low, low_top),
        _mm256_unpacklo_epi16(high, high_top),
        _mm256_unpackhi_epi16(high, high_top),
    ]
    .map(|w| _mm256_castsi256_ps(w))
}

/// The 16-bit values of 32 codes: of codes 0-7 of each half, and of codes 8-15.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn look_up_u16(codes: __m256i, planes: &[__m256i; 2]) -> [__m256i; 2] {
    let [low, high] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
}

/// For eight scaled values the number of thresholds strictly below each (15 for NaN), by binary search.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn nearest_codes(x: __m256) -> __m256i {
    const T: [f32; 15] = THRESHOLDS;
    const FOURTHS: [f32; 8] = [T[1], T[5], T[9], T[13], T[1], T[5], T[9], T[13]];
    const EIGHTHS: [f32; 8] = [T[0], T[2], T[4], T[6], T[8], T[10], T[12], T[14]];
    let above = |t: __m256| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLE_UQ>(x, t));
    // A mask is -1 where the value is above, so subtracting it counts.
    let twice_plus = |code: __m256i, mask: __m256i| _mm256_sub_epi32(_mm256_add_epi32(code, code), mask);
    let half = above(_mm256_set1_ps(T[7]));
    let quarter = above(_mm256_blendv_ps(_mm256_set1_ps(T[3]), _mm256_set1_ps(T[11]), _mm256_castsi256_ps(half)));
    let code = twice_plus(_mm256_srli_epi32::<31>(half), quarter);
    let code = twice_plus(code, above(_mm256_permutevar_ps(load_f32(&FOURTHS), code)));
    twice_plus(code, above(_mm256_permutevar8x32_ps(load_f32(&EIGHTHS), code)))
}

/// 4 x 8 codes in 32-bit lanes to 16 bytes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pack_codes([a, b, c, d]: [__m256i; 4]) -> __m128i {
    let bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // The packs work in halves: 32-bit pieces a0 b0 c0 d0 | a1 b1 c1 d1.
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}
