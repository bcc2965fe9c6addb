//! Codes in bytes: apart and together, looked up, found and packed.

use core::arch::wasm32::*;

use bytemuck::must_cast;

use super::registers::{load_f32, load_f32x4};
use crate::format::THRESHOLDS;

/// The codes of the even and of the odd columns of 16 packed bytes.
#[inline]
pub(super) fn split_codes(bytes: &[u8; 16]) -> [v128; 2] {
    let bytes = must_cast(*bytes);
    [u8x16_shr(bytes, 4), v128_and(bytes, u8x16_splat(15))]
}

/// The 32 codes of 16 packed bytes, one a byte, in column order.
#[inline]
pub(super) fn codes_in_order(bytes: &[u8; 16]) -> [v128; 2] {
    let [even, odd] = split_codes(bytes);
    zip_u8(even, odd)
}

/// Low and high bytes of sixteen 16-bit values.
#[inline]
pub(super) fn u16_planes([a, b]: [v128; 2]) -> [v128; 2] {
    [
        i8x16_shuffle::<0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30>(a, b),
        i8x16_shuffle::<1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31>(a, b),
    ]
}

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

/// Low and high bytes to 16-bit integers, in order.
#[inline]
fn zip_u8(low: v128, high: v128) -> [v128; 2] {
    [
        i8x16_shuffle::<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(low, high),
        i8x16_shuffle::<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(low, high),
    ]
}

/// Low and high halves to 32-bit integers, in order.
#[inline]
pub(super) fn zip_u16(low: v128, high: v128) -> [v128; 2] {
    [i16x8_shuffle::<0, 8, 1, 9, 2, 10, 3, 11>(low, high), i16x8_shuffle::<4, 12, 5, 13, 6, 14, 7, 15>(low, high)]
}

/// For four scaled values the number of thresholds not below each (0 for NaN): 15 less the code, in each of the four
/// bytes. By binary search, in which each comparison gives the next bit: its mask is -1 where it holds, so subtracting
/// appends.
#[inline]
pub(super) fn nearest_codes(x: v128) -> v128 {
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
pub(super) fn pack_codes(codes: [[v128; 2]; 4]) -> v128 {
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
