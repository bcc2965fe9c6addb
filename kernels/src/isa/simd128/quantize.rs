//! Weights to codes and absmax.

use core::arch::wasm32::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::{THRESHOLDS, absmax_from_bits, inverse_absmax};
use crate::isa::scalar;

macro_rules! quantize {
    ($name:ident, $element:ty, $load:ident) => {
        /// Codes and absmax of a tensor.
        pub(super) fn $name(weights: &[$element], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
            let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for ((block, packed), absmax) in blocks {
                if block.len() < block_size {
                    *absmax = scalar::quantize_partial_block(block, packed);
                    continue;
                }
                let mut largest = u32x4_splat(0);
                for x in block.as_chunks().0 {
                    largest = u32x4_max(largest, largest_bits($load(x)));
                }
                *absmax = absmax_from_bits(largest_u32(largest));
                let inverse = f32x4_splat(inverse_absmax(*absmax));
                for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
                    let mut codes = [[u8x16_splat(0); 2]; 4];
                    for (codes, x) in codes.iter_mut().zip(x.as_chunks().0) {
                        let [a, b] = product($load(x), [inverse; 2]);
                        *codes = [nearest_codes(a), nearest_codes(b)];
                    }
                    store_128(packed, pack_codes(codes));
                }
            }
        }
    };
}

quantize!(quantize_f32, f32, load_f32);
quantize!(quantize_f16, f16, load_f16);
quantize!(quantize_bf16, bf16, load_bf16);

/// For four scaled values the number of thresholds not below each (0 for NaN): 15 less the code, in each of the four
/// bytes. By binary search, in which each comparison gives the next bit: its mask is -1 where it holds, so subtracting
/// appends.
#[inline]
fn nearest_codes(x: v128) -> v128 {
    const T: [f32; 15] = THRESHOLDS;
    const FOURTHS: [f32; 4] = [T[13], T[9], T[5], T[1]];
    const EIGHTHS: [f32; 8] = [T[14], T[12], T[10], T[8], T[6], T[4], T[2], T[0]];
    let twice = |code| u8x16_add(code, code);
    let append = |code, mask| u8x16_sub(twice(code), mask);
    // The bytes of entry `code` in a table of f32 are `4 * code + [0, 1, 2, 3]`.
    let entry = |code| u8x16_add(twice(twice(code)), u32x4_splat(0x0302_0100));
    let [low, high] = load_f32(&EIGHTHS);
    let half = f32x4_le(x, f32x4_splat(T[7]));
    let quarter = f32x4_le(x, v128_bitselect(f32x4_splat(T[3]), f32x4_splat(T[11]), half));
    let code = append(u8x16_sub(u8x16_splat(0), half), quarter);
    let code = append(code, f32x4_le(x, u8x16_swizzle(load_f32x4(&FOURTHS), entry(code))));
    // An index from 16 on finds 0, so each half of the table is looked up with the indices of the other beyond its end.
    let eighth = entry(code);
    let eighth = v128_or(u8x16_swizzle(low, eighth), u8x16_swizzle(high, v128_xor(eighth, u8x16_splat(16))));
    append(code, f32x4_le(x, eighth))
}

/// The complements of 4 x 8 codes, in four bytes each, to the 16 bytes of the codes.
#[inline]
fn pack_codes(codes: [[v128; 2]; 4]) -> v128 {
    let mut bytes = [u32x4_splat(0); 4];
    for (bytes, [a, b]) in bytes.iter_mut().zip(codes) {
        let fifteen = u32x4_splat(15);
        let codes = i16x8_narrow_i32x4(v128_andnot(fifteen, a), v128_andnot(fifteen, b));
        // Of each two neighbours, 16 times the first plus the second.
        *bytes = i32x4_dot_i16x8(codes, u32x4_splat(0x0001_0010));
    }
    let [a, b, c, d] = bytes;
    u8x16_narrow_i16x8(i16x8_narrow_i32x4(a, b), i16x8_narrow_i32x4(c, d))
}
