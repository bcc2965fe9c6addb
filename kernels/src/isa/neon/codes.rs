//! Codes in bytes: apart and together, looked up, found and packed.

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::registers::{load_f32, load_f32x4};
use crate::format::THRESHOLDS;

/// The codes of the even and of the odd columns of 16 packed bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn split_codes(bytes: &[u8; 16]) -> [uint8x16_t; 2] {
    let bytes = must_cast(*bytes);
    [vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15))]
}

/// The 32 codes of 16 packed bytes, one a byte, in column order.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn codes_in_order(bytes: &[u8; 16]) -> [uint8x16_t; 2] {
    let [even, odd] = split_codes(bytes);
    [vzip1q_u8(even, odd), vzip2q_u8(even, odd)]
}

/// Low and high bytes of sixteen 16-bit values.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn u16_planes(values: [uint16x8_t; 2]) -> [uint8x16_t; 2] {
    let [a, b] = values.map(|v| vreinterpretq_u8_u16(v));
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)]
}

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

/// Low and high bytes to 16-bit integers, in order.
#[target_feature(enable = "neon")]
#[inline]
fn zip_u8(low: uint8x16_t, high: uint8x16_t) -> [uint16x8_t; 2] {
    [vzip1q_u8(low, high), vzip2q_u8(low, high)].map(|x| vreinterpretq_u16_u8(x))
}

/// For four scaled values the number of thresholds not below each (0 for NaN): 15 less the code, in each of the four
/// bytes. By binary search, in which each comparison gives the next bit as it is, for `sli` to append.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn nearest_codes(x: float32x4_t) -> uint8x16_t {
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
pub(super) fn pack_codes(codes: [[uint8x16_t; 2]; 4]) -> uint8x16_t {
    let [a, b, c, d] = codes.map(|[x, y]| vuzp1q_u8(x, y));
    let (first, second) = (vuzp1q_u8(a, b), vuzp1q_u8(c, d));
    vmvnq_u8(vsliq_n_u8::<4>(vuzp2q_u8(first, second), vuzp1q_u8(first, second)))
}
