//! Codes to weights.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::CODEBOOK;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;

/// From this size on the weights as f32 are written past the caches: what does not fit in them would first be read, and
/// gone before it is used. Measured on a core with 32 MB of last cache: 1.2 times as fast for 64 MB, 0.9 times for 16
/// MB; weights of 16 bits do not gain.
const STREAM_BYTES: usize = 32 << 20;

/// The weights as f32.
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    if size_of_val(out) < STREAM_BYTES {
        store_weights(matrix, out, |out, w| store_f32(out, w));
    } else {
        // SAFETY: the fence comes before anything else uses `out`.
        store_weights(matrix, out, |out, w| unsafe { stream_f32(out, w) });
        _mm_sfence();
    }
}

/// The weights as f32; `store` writes eight.
#[target_feature(enable = "avx2")]
#[inline]
fn store_weights(matrix: &Nf4Matrix<'_>, out: &mut [f32], store: impl Fn(&mut [f32; 8], __m256)) {
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
                        store(out, _mm256_mul_ps(w, absmax));
                    }
                }
            }
            _ => scalar::dequantize_segment(matrix, &segment, out),
        }
    }
}

macro_rules! dequantize_half {
    ($name:ident, $element:ty, $features:literal, $round:ident) => {
        /// The weights rounded to 16 bits: the sixteen products of a block are rounded once, then looked up as two
        /// bytes.
        #[target_feature(enable = $features)]
        pub(super) fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let planes = u16_planes($round(_mm256_set1_ps(segment.absmax)));
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

dequantize_half!(dequantize_f16, f16, "avx2,f16c", codebook_f16);
dequantize_half!(dequantize_bf16, bf16, "avx2", codebook_bf16);

/// The codebook times absmax, rounded to f16.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn codebook_f16(absmax: __m256) -> __m256i {
    let (book, _) = CODEBOOK.as_chunks();
    let round = |x| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_mul_ps(load_f32(x), absmax));
    _mm256_set_m128i(round(&book[1]), round(&book[0]))
}

/// The codebook times absmax, rounded to bf16.
#[target_feature(enable = "avx2")]
#[inline]
fn codebook_bf16(absmax: __m256) -> __m256i {
    // Packing takes four from each half in turn.
    const C: [f32; 16] = CODEBOOK;
    const FIRST: [f32; 8] = [C[0], C[1], C[2], C[3], C[8], C[9], C[10], C[11]];
    const SECOND: [f32; 8] = [C[4], C[5], C[6], C[7], C[12], C[13], C[14], C[15]];
    let round = |x| round_bf16(_mm256_mul_ps(load_f32(x), absmax));
    _mm256_packus_epi32(round(&FIRST), round(&SECOND))
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

/// The 32 values of 16 packed bytes, in column order.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_u16(bytes: &[u8; 16], planes: &[__m256i; 2]) -> [__m256i; 2] {
    let codes = codes_in_order::<8>(bytes);
    let [b0, b1] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    [_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)]
}

/// The 32 codes of 16 packed bytes, one a byte. Runs of `RUN` codes (4 or 8) go to the two halves in turn, so that
/// unpacking what is looked up for them leaves whole registers in column order.
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
pub(super) fn u16_planes(values: __m256i) -> [__m256i; 2] {
    let apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    let bytes = _mm256_shuffle_epi8(values, apart);
    [_mm256_permute4x64_epi64::<0b10_00_10_00>(bytes), _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes)]
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
