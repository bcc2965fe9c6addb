//! Codes to weights.

use core::arch::wasm32::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::CODEBOOK;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;

/// The weights as f32.
pub(super) fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    let planes = f32_planes();
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let absmax = [f32x4_splat(segment.absmax); 2];
                for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                    for (codes, out) in codes_in_order(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
                        let [a, b, c, d] = look_up_f32(codes, &planes);
                        let (out, _) = out.as_chunks_mut();
                        store_f32(&mut out[0], product([a, b], absmax));
                        store_f32(&mut out[1], product([c, d], absmax));
                    }
                }
            }
            _ => scalar::dequantize_segment(matrix, &segment, out),
        }
    }
}

macro_rules! dequantize_half {
    ($name:ident, $element:ty, $round:ident) => {
        /// The weights rounded to 16 bits: the sixteen products of a block are rounded once, then looked up as two
        /// bytes.
        pub(super) fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let (book, _) = CODEBOOK.as_chunks();
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let absmax = [f32x4_splat(segment.absmax); 2];
                        let values = |i: usize| $round(product(load_f32(&book[i]), absmax));
                        let planes = u16_planes([values(0), values(1)]);
                        for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                            for (codes, out) in codes_in_order(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
                                let [a, b] = look_up_u16(codes, &planes);
                                let (out, _) = out.as_chunks_mut();
                                store_u16(&mut out[0], a);
                                store_u16(&mut out[1], b);
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

/// The weights, without absmax, of 16 codes in order: their four bytes are looked up apart and zipped twice.
#[inline]
pub(super) fn look_up_f32(codes: v128, planes: &[v128; 4]) -> [v128; 4] {
    let byte = |p: usize| u8x16_swizzle(planes[p], codes);
    let ([low, high], [low_top, high_top]) = (zip_u8(byte(0), byte(1)), zip_u8(byte(2), byte(3)));
    let ([a, b], [c, d]) = (zip_u16(low, low_top), zip_u16(high, high_top));
    [a, b, c, d]
}

/// The values of 16 codes in order.
#[inline]
pub(super) fn look_up_u16(codes: v128, [low, high]: &[v128; 2]) -> [v128; 2] {
    zip_u8(u8x16_swizzle(*low, codes), u8x16_swizzle(*high, codes))
}

/// The 32 codes of 16 packed bytes, one a byte, in column order.
#[inline]
fn codes_in_order(bytes: &[u8; 16]) -> [v128; 2] {
    let [even, odd] = split_codes(bytes);
    zip_u8(even, odd)
}

/// The codes of the even and of the odd columns of 16 packed bytes.
#[inline]
pub(super) fn split_codes(bytes: &[u8; 16]) -> [v128; 2] {
    let bytes = load_128(bytes);
    [u8x16_shr(bytes, 4), v128_and(bytes, u8x16_splat(15))]
}

/// Byte `p` of the f32 of all codes.
#[inline]
pub(super) fn f32_planes() -> [v128; 4] {
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
    [0, 1, 2, 3].map(|p| load_128(&PLANES[p]))
}

/// Low and high bytes of sixteen 16-bit values.
#[inline]
pub(super) fn u16_planes([a, b]: [v128; 2]) -> [v128; 2] {
    [
        i8x16_shuffle::<0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30>(a, b),
        i8x16_shuffle::<1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31>(a, b),
    ]
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: there is no instruction for it.
#[inline]
fn round_f16(x: F32x8) -> v128 {
    let rounded = |x: v128| {
        let bits = abs_bits(x);
        let sign = u32x4_shr(v128_xor(x, bits), 16);
        // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go; it takes the carry.
        let odd = v128_and(u32x4_shr(bits, 13), u32x4_splat(1));
        let bias = u32x4_splat(0xfff_u32.wrapping_sub((127 - 15) << 23));
        let normal = u32x4_shr(u32x4_add(u32x4_add(bits, bias), odd), 13);
        // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
        let half = f32x4_splat(0.5);
        let subnormal = u32x4_sub(f32x4_add(bits, half), half);
        let is_subnormal = i32x4_lt(bits, i32x4_splat(113 << 23));
        // From 2^16 on the exponent would run past infinity.
        let finite = u32x4_min(normal, u32x4_splat(0x7c00));
        v128_or(v128_bitselect(subnormal, finite, is_subnormal), sign)
    };
    u16x8_narrow_i32x4(rounded(x[0]), rounded(x[1]))
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[inline]
fn round_bf16(x: F32x8) -> v128 {
    let rounded = |bits: v128| {
        let odd = v128_and(u32x4_shr(bits, 16), u32x4_splat(1));
        u32x4_add(u32x4_add(bits, u32x4_splat(0x7fff)), odd)
    };
    // The upper halves.
    i16x8_shuffle::<1, 3, 5, 7, 9, 11, 13, 15>(rounded(x[0]), rounded(x[1]))
}
