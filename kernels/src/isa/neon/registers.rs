//! Registers: loads and stores, which are casts of arrays, arithmetic on two at a time, and single instructions of
//! assembly.

#![expect(unsafe_code, reason = "an optimization barrier and prefetches in assembly")]

use core::arch::aarch64::*;
use core::arch::asm;

use bytemuck::must_cast;

/// Eight columns, or the eight lanes of a row.
pub(super) type F32x8 = [float32x4_t; 2];

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> F32x8 {
    must_cast(*x)
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f32x4(x: &[f32; 4]) -> float32x4_t {
    must_cast(*x)
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: F32x8) {
    *out = must_cast(x);
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_f32x4(out: &mut [f32; 4], x: float32x4_t) {
    *out = must_cast(x);
}

/// One value in all lanes, or one in each half.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn spread<const GROUPS: usize>(x: &[f32; GROUPS]) -> F32x8 {
    [vdupq_n_f32(x[0]), vdupq_n_f32(x[GROUPS - 1])]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add(a: F32x8, b: F32x8) -> F32x8 {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn mul(a: F32x8, b: F32x8) -> F32x8 {
    [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])]
}

/// An optimization barrier: keeps the loads after it from being done before, for loops that need every register. No
/// instruction.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn one_after_the_other([low, high]: &mut F32x8) {
    // SAFETY: the assembly is empty.
    unsafe { asm!("/* {0:v} {1:v} */", inout(vreg) * low, inout(vreg) * high, options(nostack, preserves_flags)) };
}

/// As [`one_after_the_other`], for sums of products.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn sums_before_loads([a, b, c, d]: &mut [int32x4_t; 4]) {
    // SAFETY: the assembly is empty.
    unsafe {
        asm!(
            "/* {0:v} {1:v} {2:v} {3:v} */",
            inout(vreg) * a,
            inout(vreg) * b,
            inout(vreg) * c,
            inout(vreg) * d,
            options(nostack, preserves_flags)
        );
    }
}

/// Prefetches the cache line `ahead` bytes after the start of `data`, whether it lies in it or not.
#[inline(always)]
pub(super) fn prefetch<T>(data: &[T], ahead: usize) {
    let line = data.as_ptr().cast::<u8>().wrapping_add(ahead);
    // SAFETY: a prefetch takes any address.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags)) };
}

/// `sums` and, in each lane, the products of four 8-bit integers. The intrinsic is not stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(super) fn dot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: computes on registers alone.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// As [`dot`], where every lane is multiplied with lane `LANE` of `b`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(super) fn dot_lane<const LANE: u8>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: computes on registers alone.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]",
            inout(vreg) sums, in(vreg) a, in(vreg) b, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// `sums`, a matrix of 2 x 2, and the product of `a`, a matrix of 2 x 8, with the transpose of `b`, one too. The intrinsic
/// is not stable.
#[target_feature(enable = "neon,i8mm")]
#[inline]
pub(super) fn matrix_product(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: computes on registers alone.
    unsafe {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
