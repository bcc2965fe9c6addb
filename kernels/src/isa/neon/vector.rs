//! Loads, stores and small steps that several files share.

use core::arch::aarch64::*;
use core::arch::asm;

use half::{bf16, f16};

/// Eight columns, or the eight lanes of a row.
pub(super) type F32x8 = [float32x4_t; 2];

/// [`crate::spec::add_lanes`] of the lanes of two registers.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_lanes([low, high]: F32x8) -> f32 {
    let four = vaddq_f32(low, high);
    vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
}

/// One value in all lanes, or one in each half.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn spread<const GROUPS: usize>(x: &[f32; GROUPS]) -> F32x8 {
    [vdupq_n_f32(x[0]), vdupq_n_f32(x[GROUPS - 1])]
}

/// Keeps the loads after it from being done before, for loops that need every register. No instruction.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn one_after_the_other([low, high]: &mut F32x8) {
    // SAFETY: the assembly is empty.
    unsafe { asm!("/* {0:v} {1:v} */", inout(vreg) * low, inout(vreg) * high, options(nostack, preserves_flags)) };
}

/// Asks for the cache line `ahead` bytes after the start of `bytes`, theirs or not.
#[inline(always)]
pub(super) fn prefetch(bytes: &[u8], ahead: usize) {
    let line = bytes.as_ptr().wrapping_add(ahead);
    // SAFETY: a prefetch takes any address.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags)) };
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn sum(a: F32x8, b: F32x8) -> F32x8 {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn product(a: F32x8, b: F32x8) -> F32x8 {
    [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])]
}

/// Bits of the absolute values.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn abs_bits(x: float32x4_t) -> uint32x4_t {
    vreinterpretq_u32_f32(vabsq_f32(x))
}

/// The larger of the absolute values in lanes `i` and `i + 4`, as bits.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn largest_bits([low, high]: F32x8) -> uint32x4_t {
    vmaxq_u32(abs_bits(low), abs_bits(high))
}

/// Low and high bytes to 16-bit integers, in order.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn zip_u8(low: uint8x16_t, high: uint8x16_t) -> [uint16x8_t; 2] {
    [vzip1q_u8(low, high), vzip2q_u8(low, high)].map(|x| vreinterpretq_u16_u8(x))
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_bf16(x: &[bf16; 8]) -> F32x8 {
    shift_to_top(load_u16(x))
}

/// f16 to f32, exact, NaN and subnormals included: the exponent is moved by a product with 2^112.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f16(x: &[f16; 8]) -> F32x8 {
    let bits = load_u16(x);
    let magnitude = vandq_u16(bits, vdupq_n_u16(0x7fff));
    let special = vandq_u16(vcgtq_u16(magnitude, vdupq_n_u16(0x7bff)), vdupq_n_u16(0x7f80));
    let top = shift_to_top(vorrq_u16(veorq_u16(bits, magnitude), special));
    let join = |magnitude: uint32x4_t, top: float32x4_t| {
        let scaled = vmulq_n_f32(vreinterpretq_f32_u32(magnitude), f32::from_bits((127 + 112) << 23));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), vreinterpretq_u32_f32(top)))
    };
    let low = vshll_n_u16::<13>(vget_low_u16(magnitude));
    [join(low, top[0]), join(vshll_high_n_u16::<13>(magnitude), top[1])]
}

/// Eight f32 whose upper 16 bits are given, the others 0.
#[target_feature(enable = "neon")]
#[inline]
fn shift_to_top(x: uint16x8_t) -> F32x8 {
    [vshll_n_u16::<16>(vget_low_u16(x)), vshll_high_n_u16::<16>(x)].map(|x| vreinterpretq_f32_u32(x))
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> F32x8 {
    let (x, _) = x.as_chunks();
    [load_f32x4(&x[0]), load_f32x4(&x[1])]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f32x4(x: &[f32; 4]) -> float32x4_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_i16(x: &[i16; 8]) -> int16x8_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_s16(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_128(x: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_u8(x.as_ptr()) }
}

/// Eight 16-bit values of any type.
#[target_feature(enable = "neon")]
#[inline]
fn load_u16<T: Half>(x: &[T; 8]) -> uint16x8_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads, for `Half` types have two.
    unsafe { vld1q_u16(x.as_ptr().cast()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: F32x8) {
    let (out, _) = out.as_chunks_mut();
    store_f32x4(&mut out[0], x[0]);
    store_f32x4(&mut out[1], x[1]);
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_f32x4(out: &mut [f32; 4], x: float32x4_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { vst1q_f32(out.as_mut_ptr(), x) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_i16(out: &mut [i16; 8], x: int16x8_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { vst1q_s16(out.as_mut_ptr(), x) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_u16<T: Half>(out: &mut [T; 8], x: uint16x8_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes, for `Half` types have two and take any bits.
    unsafe { vst1q_u16(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_128(out: &mut [u8; 16], x: uint8x16_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { vst1q_u8(out.as_mut_ptr(), x) }
}

/// The two types of 16 bits that any bit pattern is a value of.
pub(super) trait Half {}
impl Half for f16 {}
impl Half for bf16 {}
const _: () = assert!(size_of::<f16>() == 2 && size_of::<bf16>() == 2);
