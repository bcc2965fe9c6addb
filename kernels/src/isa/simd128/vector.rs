//! Loads, stores and small steps that several files share.

use core::arch::wasm32::*;

use half::{bf16, f16};

/// Eight columns, or the eight lanes of a row.
pub(super) type F32x8 = [v128; 2];

/// [`crate::spec::add_lanes`] of the lanes of two registers.
#[inline]
pub(super) fn add_lanes([low, high]: F32x8) -> f32 {
    let four = f32x4_add(low, high);
    let two = f32x4_add(four, i32x4_shuffle::<2, 3, 0, 1>(four, four));
    f32x4_extract_lane::<0>(two) + f32x4_extract_lane::<1>(two)
}

/// One value in all lanes, or one in each half.
#[inline]
pub(super) fn spread<const GROUPS: usize>(x: &[f32; GROUPS]) -> F32x8 {
    [f32x4_splat(x[0]), f32x4_splat(x[GROUPS - 1])]
}

/// WebAssembly has no such hint.
#[inline(always)]
pub(super) fn prefetch(_bytes: &[u8], _ahead: usize) {}

#[inline]
pub(super) fn sum(a: F32x8, b: F32x8) -> F32x8 {
    [f32x4_add(a[0], b[0]), f32x4_add(a[1], b[1])]
}

#[inline]
pub(super) fn product(a: F32x8, b: F32x8) -> F32x8 {
    [f32x4_mul(a[0], b[0]), f32x4_mul(a[1], b[1])]
}

/// Bits of the absolute values.
#[inline]
pub(super) fn abs_bits(x: v128) -> v128 {
    v128_and(x, u32x4_splat(0x7fff_ffff))
}

/// The larger of the absolute values in lanes `i` and `i + 4`, as bits.
#[inline]
pub(super) fn largest_bits([low, high]: F32x8) -> v128 {
    u32x4_max(abs_bits(low), abs_bits(high))
}

/// The largest of four unsigned integers.
#[inline]
pub(super) fn largest_u32(x: v128) -> u32 {
    let x = u32x4_max(x, i32x4_shuffle::<2, 3, 0, 1>(x, x));
    u32x4_extract_lane::<0>(x).max(u32x4_extract_lane::<1>(x))
}

/// Low and high bytes to 16-bit integers, in order.
#[inline]
pub(super) fn zip_u8(low: v128, high: v128) -> [v128; 2] {
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

#[inline]
pub(super) fn load_bf16(x: &[bf16; 8]) -> F32x8 {
    shift_to_top(load_u16(x))
}

/// f16 to f32, exact, NaN and subnormals included: the exponent is moved by a product with 2^112.
#[inline]
pub(super) fn load_f16(x: &[f16; 8]) -> F32x8 {
    let bits = load_u16(x);
    let magnitude = v128_and(bits, u16x8_splat(0x7fff));
    let special = v128_and(i16x8_gt(magnitude, i16x8_splat(0x7bff)), u16x8_splat(0x7f80));
    let top = shift_to_top(v128_or(v128_xor(bits, magnitude), special));
    let scale = f32x4_splat(f32::from_bits((127 + 112) << 23));
    let join = |magnitude: v128, top: v128| v128_or(f32x4_mul(u32x4_shl(magnitude, 13), scale), top);
    [join(u32x4_extend_low_u16x8(magnitude), top[0]), join(u32x4_extend_high_u16x8(magnitude), top[1])]
}

/// Eight f32 whose upper 16 bits are given, the others 0.
#[inline]
fn shift_to_top(x: v128) -> F32x8 {
    zip_u16(u16x8_splat(0), x)
}

#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> F32x8 {
    let (x, _) = x.as_chunks();
    [load_f32x4(&x[0]), load_f32x4(&x[1])]
}

#[inline]
pub(super) fn load_f32x4(x: &[f32; 4]) -> v128 {
    // SAFETY: the array has the 16 bytes that the load reads; it needs no alignment.
    unsafe { v128_load(x.as_ptr().cast()) }
}

#[inline]
pub(super) fn load_i16(x: &[i16; 8]) -> v128 {
    // SAFETY: the array has the 16 bytes that the load reads; it needs no alignment.
    unsafe { v128_load(x.as_ptr().cast()) }
}

#[inline]
pub(super) fn load_128(x: &[u8; 16]) -> v128 {
    // SAFETY: the array has the 16 bytes that the load reads; it needs no alignment.
    unsafe { v128_load(x.as_ptr().cast()) }
}

/// Eight 16-bit values of any type.
#[inline]
fn load_u16<T: Half>(x: &[T; 8]) -> v128 {
    // SAFETY: the array has the 16 bytes that the load reads, for `Half` types have two; it needs no alignment.
    unsafe { v128_load(x.as_ptr().cast()) }
}

#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: F32x8) {
    let (out, _) = out.as_chunks_mut();
    store_f32x4(&mut out[0], x[0]);
    store_f32x4(&mut out[1], x[1]);
}

#[inline]
pub(super) fn store_f32x4(out: &mut [f32; 4], x: v128) {
    // SAFETY: the array has the 16 bytes that the store writes; it needs no alignment.
    unsafe { v128_store(out.as_mut_ptr().cast(), x) }
}

#[inline]
pub(super) fn store_i16(out: &mut [i16; 8], x: v128) {
    // SAFETY: the array has the 16 bytes that the store writes; it needs no alignment.
    unsafe { v128_store(out.as_mut_ptr().cast(), x) }
}

#[inline]
pub(super) fn store_u16<T: Half>(out: &mut [T; 8], x: v128) {
    // SAFETY: the array has the 16 bytes that the store writes, for `Half` types have two and take any bits; it needs
    // no alignment.
    unsafe { v128_store(out.as_mut_ptr().cast(), x) }
}

#[inline]
pub(super) fn store_128(out: &mut [u8; 16], x: v128) {
    // SAFETY: the array has the 16 bytes that the store writes; it needs no alignment.
    unsafe { v128_store(out.as_mut_ptr().cast(), x) }
}

/// The two types of 16 bits that any bit pattern is a value of.
pub(super) trait Half {}
impl Half for f16 {}
impl Half for bf16 {}
const _: () = assert!(size_of::<f16>() == 2 && size_of::<bf16>() == 2);
