//! Codes to weights.

use core::arch::aarch64::*;

use half::{bf16, f16};

use super::vector::*;
use crate::format::CODEBOOK;
use crate::isa::scalar;
use crate::matrix::Nf4Matrix;

/// The weights as f32.
#[target_feature(enable = "neon")]
pub(super) fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    let planes = f32_planes();
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let absmax = [vdupq_n_f32(segment.absmax); 2];
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
        #[target_feature(enable = "neon")]
        pub(super) fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let (book, _) = CODEBOOK.as_chunks();
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let absmax = [vdupq_n_f32(segment.absmax); 2];
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
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn look_up_f32(codes: uint8x16_t, planes: &[uint8x16_t; 4]) -> [float32x4_t; 4] {
    let [b0, b1, b2, b3] = planes.map(|p| vqtbl1q_u8(p, codes));
    let ([low, high], [low_top, high_top]) = (zip_u8(b0, b1), zip_u8(b2, b3));
    [vzip1q_u16(low, low_top), vzip2q_u16(low, low_top), vzip1q_u16(high, high_top), vzip2q_u16(high, high_top)]
        .map(|w| vreinterpretq_f32_u16(w))
}

/// The values of 16 codes in order.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn look_up_u16(codes: uint8x16_t, [low, high]: &[uint8x16_t; 2]) -> [uint16x8_t; 2] {
    zip_u8(vqtbl1q_u8(*low, codes), vqtbl1q_u8(*high, codes))
}

/// The 32 codes of 16 packed bytes, one a byte, in column order.
#[target_feature(enable = "neon")]
#[inline]
fn codes_in_order(bytes: &[u8; 16]) -> [uint8x16_t; 2] {
    let [even, odd] = split_codes(bytes);
    [vzip1q_u8(even, odd), vzip2q_u8(even, odd)]
}

/// The codes of the even and of the odd columns of 16 packed bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn split_codes(bytes: &[u8; 16]) -> [uint8x16_t; 2] {
    let bytes = load_128(bytes);
    [vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15))]
}

/// Byte `p` of the f32 of all codes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn f32_planes() -> [uint8x16_t; 4] {
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
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn u16_planes(values: [uint16x8_t; 2]) -> [uint8x16_t; 2] {
    let [a, b] = values.map(|v| vreinterpretq_u8_u16(v));
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)]
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: the intrinsic for it came with Rust 1.94, after
/// the oldest Rust that this crate supports.
#[target_feature(enable = "neon")]
#[inline]
fn round_f16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = abs_bits(x);
        let sign = vshrq_n_u32::<16>(vbicq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fff_ffff)));
        // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go; it takes the carry.
        let odd = vandq_u32(vshrq_n_u32::<13>(bits), vdupq_n_u32(1));
        let bias = vdupq_n_u32(0xfff_u32.wrapping_sub((127 - 15) << 23));
        let normal = vshrq_n_u32::<13>(vaddq_u32(vaddq_u32(bits, bias), odd));
        // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
        let half = vdupq_n_f32(0.5);
        let sum = vaddq_f32(vreinterpretq_f32_u32(bits), half);
        let subnormal = vsubq_u32(vreinterpretq_u32_f32(sum), vreinterpretq_u32_f32(half));
        let is_subnormal = vcltq_u32(bits, vdupq_n_u32(113 << 23));
        // From 2^16 on the exponent would run past infinity.
        let finite = vminq_u32(normal, vdupq_n_u32(0x7c00));
        vorrq_u32(vbslq_u32(is_subnormal, subnormal, finite), sign)
    };
    narrow_u16([rounded(x[0]), rounded(x[1])])
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[target_feature(enable = "neon")]
#[inline]
fn round_bf16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        vreinterpretq_u16_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd))
    };
    // The upper halves.
    vuzp2q_u16(rounded(x[0]), rounded(x[1]))
}

/// Eight 32-bit integers below 2^16 as 16-bit integers.
#[target_feature(enable = "neon")]
#[inline]
fn narrow_u16(x: [uint32x4_t; 2]) -> uint16x8_t {
    let [low, high] = x.map(|x| vreinterpretq_u16_u32(x));
    vuzp1q_u16(low, high)
}
