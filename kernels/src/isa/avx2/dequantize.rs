//! Codes to weights.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::CODEBOOK;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;

/// The weights as f32.
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    let planes = f32_planes();
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let absmax = _mm256_set1_ps(segment.absmax);
                for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                    let weights = look_up_f32(codes_in_order::<4>(bytes), &planes);
                    for (w, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
                        store_f32(out, _mm256_mul_ps(w, absmax));
                    }
                }
            }
            _ => scalar::dequantize_segment(matrix, &segment, out),
        }
    }
}

macro_rules! dequantize_half {
    ($name:ident, $element:ty, $round:ident) => {
        /// The weights rounded to 16 bits: the sixteen products of a block are rounded once, then looked up as two bytes.
        #[target_feature(enable = "avx2")]
        pub(super) fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let (book, _) = CODEBOOK.as_chunks();
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let absmax = _mm256_set1_ps(segment.absmax);
                        let values = [0, 1].map(|i| $round(_mm256_mul_ps(load_f32(&book[i]), absmax)));
                        let planes = u16_planes(values);
                        for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                            let weights = decode_u16(bytes, &planes);
                            for (w, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
                                store_u16(out, w);
                            }
                        }
                    }
                    _ => scalar::dequantize_segment(matrix, &segment, out),
                }
            }
        }
    };
}

dequantize_half!(dequantize_f16, f16, round_f16);
dequantize_half!(dequantize_bf16, bf16, round_bf16);

/// The weights, without absmax, of 32 codes. Codes `4i..4i+4` of each half become the 32-bit lanes of result `i`: their four
/// bytes are looked up apart and brought together by two levels of unpacking.
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

/// The 32 values of 16 packed bytes, in column order.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_u16(bytes: &[u8; 16], planes: &[__m256i; 2]) -> [__m256i; 2] {
    let codes = codes_in_order::<8>(bytes);
    let [b0, b1] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    [_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)]
}

/// The 32 codes of 16 packed bytes, one a byte. Runs of `RUN` codes (4 or 8) go to the two halves in turn, so that unpacking
/// what is looked up for them leaves whole registers in column order.
#[target_feature(enable = "avx2")]
#[inline]
fn codes_in_order<const RUN: usize>(bytes: &[u8; 16]) -> __m256i {
    let twice = const {
        let mut from = [0; 32];
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
    let twice = _mm256_shuffle_epi8(_mm256_set_m128i(load_128(bytes), load_128(bytes)), load_256(&twice));
    let even = _mm256_and_si256(_mm256_srli_epi16::<4>(twice), _mm256_set1_epi16(0x000f));
    _mm256_or_si256(even, _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00)))
}

/// The codes of the even and of the odd columns of a span of 64.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn split_codes(packed: &[u8; 32]) -> [__m256i; 2] {
    let (bytes, nibble) = (load_256(packed), _mm256_set1_epi8(15));
    [_mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble), _mm256_and_si256(bytes, nibble)]
}

/// Byte `p` of the f32 of all codes, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn f32_planes() -> [__m256i; 4] {
    const PLANES: [[u8; 16]; 4] = {
        let mut planes = [[0; 16]; 4];
        let mut k = 0;
        while k < 16 {
            let bytes = CODEBOOK[k].to_le_bytes();
            (planes[0][k], planes[1][k], planes[2][k], planes[3][k]) = (bytes[0], bytes[1], bytes[2], bytes[3]);
            k += 1;
        }
        planes
    };
    [0, 1, 2, 3].map(|p| _mm256_broadcastsi128_si256(load_128(&PLANES[p])))
}

/// Low and high bytes of sixteen 16-bit values, each in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn u16_planes([a, b]: [__m128i; 2]) -> [__m256i; 2] {
    let low = _mm_set1_epi16(0xff);
    let plane = |x, y| _mm256_broadcastsi128_si256(_mm_packus_epi16(x, y));
    [plane(_mm_and_si128(a, low), _mm_and_si128(b, low)), plane(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b))]
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: F16C is a feature of its own.
#[target_feature(enable = "avx2")]
#[inline]
fn round_f16(x: __m256) -> __m128i {
    let bits = abs_bits(x);
    let sign = _mm256_srli_epi32::<16>(_mm256_andnot_si256(_mm256_set1_epi32(0x7fff_ffff), _mm256_castps_si256(x)));
    // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go, a carry running into the exponent.
    let odd = _mm256_and_si256(_mm256_srli_epi32::<13>(bits), _mm256_set1_epi32(1));
    let bias = _mm256_set1_epi32((15 - 127) * (1 << 23) + 0xfff);
    let normal = _mm256_srli_epi32::<13>(_mm256_add_epi32(_mm256_add_epi32(bits, bias), odd));
    // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
    let half = _mm256_set1_ps(0.5);
    let sum = _mm256_add_ps(_mm256_castsi256_ps(bits), half);
    let subnormal = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(half));
    let is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(113 << 23), bits);
    // From 2^16 on the exponent would run past infinity.
    let finite = _mm256_min_epi32(normal, _mm256_set1_epi32(0x7c00));
    let magnitude = _mm256_blendv_epi8(finite, subnormal, is_subnormal);
    narrow_u16(_mm256_or_si256(magnitude, sign))
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[target_feature(enable = "avx2")]
#[inline]
fn round_bf16(x: __m256) -> __m128i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    narrow_u16(_mm256_srli_epi32::<16>(rounded))
}

/// Eight 32-bit integers below 2^16 as 16-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow_u16(x: __m256i) -> __m128i {
    _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x))
}
