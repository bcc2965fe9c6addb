//! Weights to codes and absmax.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::{THRESHOLDS, absmax_from_bits, inverse_absmax};
use crate::isa::scalar;

macro_rules! quantize {
    ($name:ident, $element:ty, $features:literal, $load:ident) => {
        /// Codes and absmax of a tensor.
        #[target_feature(enable = $features)]
        pub(super) fn $name(weights: &[$element], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
            let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for ((block, packed), absmax) in blocks {
                if block.len() < block_size {
                    *absmax = scalar::quantize_partial_block(block, packed);
                    continue;
                }
                let mut largest = _mm256_setzero_si256();
                for x in block.as_chunks().0 {
                    largest = _mm256_max_epu32(largest, abs_bits($load(x)));
                }
                *absmax = absmax_from_bits(largest_u32(largest));
                let inverse = _mm256_set1_ps(inverse_absmax(*absmax));
                for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
                    let (x, _) = x.as_chunks();
                    let codes = |i: usize| nearest_codes(_mm256_mul_ps($load(&x[i]), inverse));
                    store_128(packed, pack_codes([codes(0), codes(1), codes(2), codes(3)]));
                }
            }
        }
    };
}

quantize!(quantize_f32, f32, "avx2", load_f32);
quantize!(quantize_f16, f16, "avx2,f16c", load_f16);
quantize!(quantize_bf16, bf16, "avx2", load_bf16);

/// For eight scaled values the number of thresholds strictly below each (15 for NaN), by binary search.
#[target_feature(enable = "avx2")]
#[inline]
fn nearest_codes(x: __m256) -> __m256i {
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
fn pack_codes([a, b, c, d]: [__m256i; 4]) -> __m128i {
    let bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // The packs work in halves: 32-bit pieces a0 b0 c0 d0 | a1 b1 c1 d1.
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}
