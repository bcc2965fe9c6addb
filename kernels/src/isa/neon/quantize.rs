//! Weights to codes and absmax.

use core::arch::aarch64::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::{THRESHOLDS, absmax_from_bits, inverse_absmax};
use crate::isa::scalar;

macro_rules! quantize {
    ($name:ident, $element:ty, $load:ident) => {
        /// Codes and absmax of a tensor.
        #[target_feature(enable = "neon")]
        pub(super) fn $name(weights: &[$element], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
            let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for ((block, packed), absmax) in blocks {
                if block.len() < block_size {
                    *absmax = scalar::quantize_partial_block(block, packed);
                    continue;
                }
                let mut largest = vdupq_n_u32(0);
                for x in block.as_chunks().0 {
                    largest = vmaxq_u32(largest, largest_bits($load(x)));
                }
                *absmax = absmax_from_bits(vmaxvq_u32(largest));
                let inverse = vdupq_n_f32(inverse_absmax(*absmax));
                for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
                    let (x, _) = x.as_chunks();
                    let codes = |i: usize| {
                        let [a, b] = $load(&x[i]);
                        [nearest_codes(vmulq_f32(a, inverse)), nearest_codes(vmulq_f32(b, inverse))]
                    };
                    store_128(packed, pack_codes([codes(0), codes(1), codes(2), codes(3)]));
                }
            }
        }
    };
}

quantize!(quantize_f32, f32, load_f32);
quantize!(quantize_f16, f16, load_f16);
quantize!(quantize_bf16, bf16, load_bf16);

/// For four scaled values the number of thresholds not below each (0 for NaN): 15 less the code, in each of the four
/// bytes. By binary search, in which each comparison gives the next bit as it is, for `sli` to append.
#[target_feature(enable = "neon")]
#[inline]
fn nearest_codes(x: float32x4_t) -> uint8x16_t {
    const T: [f32; 15] = THRESHOLDS;
    const FOURTHS: [f32; 4] = [T[13], T[9], T[5], T[1]];
    const EIGHTHS: [f32; 8] = [T[14], T[12], T[10], T[8], T[6], T[4], T[2], T[0]];
    let at_most = |t| vreinterpretq_u8_u32(vcleq_f32(x, t));
    let append = |code, bit| vsliq_n_u8::<1>(bit, code);
    // The bytes of entry `code` in a table of f32 are `4 * code + [0, 1, 2, 3]`.
    let entry = |code| vsliq_n_u8::<2>(vreinterpretq_u8_u32(vdupq_n_u32(0x0302_0100)), code);
    let fourths = vreinterpretq_u8_f32(load_f32x4(&FOURTHS));
    let [low, high] = load_f32(&EIGHTHS).map(|t| vreinterpretq_u8_f32(t));
    let half = vcleq_f32(x, vdupq_n_f32(T[7]));
    let quarter = at_most(vbslq_f32(half, vdupq_n_f32(T[3]), vdupq_n_f32(T[11])));
    let code = append(vshrq_n_u8::<7>(vreinterpretq_u8_u32(half)), quarter);
    let code = append(code, at_most(vreinterpretq_f32_u8(vqtbl1q_u8(fourths, entry(code)))));
    append(code, at_most(vreinterpretq_f32_u8(vqtbl2q_u8(uint8x16x2_t(low, high), entry(code)))))
}

/// The complements of 4 x 8 codes, in four bytes each, to the 16 bytes of the codes.
#[target_feature(enable = "neon")]
#[inline]
fn pack_codes(codes: [[uint8x16_t; 2]; 4]) -> uint8x16_t {
    let [a, b, c, d] = codes.map(|[x, y]| vuzp1q_u8(x, y));
    let (first, second) = (vuzp1q_u8(a, b), vuzp1q_u8(c, d));
    vmvnq_u8(vsliq_n_u8::<4>(vuzp2q_u8(first, second), vuzp1q_u8(first, second)))
}
