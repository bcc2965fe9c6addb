//! Registers of 512 bits: loads, stores, and the assembly that the compiler does not make of its own accord.

#![expect(unsafe_code, reason = "single instructions of assembly")]

use core::arch::asm;
use core::arch::x86_64::*;

use bytemuck::must_cast;

use crate::spec::SPAN;

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_f32(x: &[f32; 16]) -> __m512 {
    must_cast(*x)
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_i16(x: &[i16; 32]) -> __m512i {
    must_cast(*x)
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 16], x: __m512) {
    *out = must_cast(x);
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_i16(out: &mut [i16; 32], x: __m512i) {
    *out = must_cast(x);
}

/// Two columns of a vector in all lanes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn broadcast_pair(values: &[i16; SPAN], pair: usize) -> __m512i {
    _mm512_set1_epi32(must_cast([values[2 * pair], values[2 * pair + 1]]))
}

/// Two packed spans, each in a half.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn two_spans(low: &[u8; 32], high: &[u8; 32]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(must_cast(*low)), must_cast(*high))
}

/// `sums + products`: in each 32-bit lane the two products of 16-bit integers. The compiler splits the intrinsic into a
/// multiplication and an addition, unless it is told to tune for one of the CPUs where it knows better.
#[target_feature(enable = "avx512vnni")]
#[inline]
pub(super) fn add_products(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: computes on registers alone, with an instruction of this function's features.
    unsafe {
        asm!(
            "vpdpwssd {0}, {1}, {2}",
            inout(zmm_reg) sums, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// As [`add_products`], of 256 bits.
#[target_feature(enable = "avx512vl,avx512vnni")]
#[inline]
pub(super) fn add_products_256(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: computes on registers alone, with an instruction of this function's features.
    unsafe {
        asm!(
            "vpdpwssd {0}, {1}, {2}",
            inout(ymm_reg) sums, in(ymm_reg) a, in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
