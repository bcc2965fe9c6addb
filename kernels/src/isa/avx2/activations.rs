//! Inputs of the 16x4 product.

use core::arch::x86_64::*;

use super::vector::*;
use crate::activations::SPAN;
use crate::isa::scalar;

/// Activations for the 16x4 multiply, in the order of [`crate::activations::SLOTS`].
#[target_feature(enable = "avx2")]
pub(super) fn quantize_activations(inputs: &[f32], group: usize, values: &mut [i16], scales: &mut [f32]) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
            padded[..inputs.len()].copy_from_slice(inputs);
            &padded
        });
        let (vectors, _) = inputs.as_chunks::<8>();
        let mut q = [_mm256_setzero_si256(); 8];
        let per_group = group / 8;
        for ((x, q), scale) in vectors.chunks(per_group).zip(q.chunks_mut(per_group)).zip(scales) {
            let mut largest = _mm256_setzero_si256();
            for x in x {
                largest = _mm256_max_epu32(largest, abs_bits(load_f32(x)));
            }
            let factor;
            (*scale, factor) = scalar::activation_scale(f32::from_bits(largest_u32(largest)));
            if factor > 0.0 {
                let factor = _mm256_set1_ps(factor);
                for (x, q) in x.iter().zip(q) {
                    *q = _mm256_cvtps_epi32(_mm256_mul_ps(load_f32(x), factor));
                }
            }
        }
        // Columns 16i..16i+16: the eight even ones in the low half, the odd ones in the high half.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
            let columns = _mm256_packs_epi32(q[2 * i], q[2 * i + 1]);
            let apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            let apart = _mm256_shuffle_epi8(columns, _mm256_broadcastsi128_si256(apart));
            _mm256_permutevar8x32_epi32(apart, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
        });
        let (out, _) = values.as_chunks_mut();
        store_i16(&mut out[0], _mm256_permute2x128_si256::<0x20>(a, c));
        store_i16(&mut out[1], _mm256_permute2x128_si256::<0x20>(b, d));
        store_i16(&mut out[2], _mm256_permute2x128_si256::<0x31>(a, c));
        store_i16(&mut out[3], _mm256_permute2x128_si256::<0x31>(b, d));
    }
}
