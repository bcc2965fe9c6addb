//! Registers: loads, the assembly that the compiler does not make of its own accord, stores past the caches.
//!
//! Loads and stores of arrays are casts, which compile to the unaligned instructions or to memory operands.

#![expect(unsafe_code, reason = "single instructions of assembly, prefetches and streaming stores")]

use core::arch::asm;
use core::arch::x86_64::*;

use bytemuck::must_cast;

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> __m256 {
    must_cast(*x)
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: __m256) {
    *out = must_cast(x);
}

/// One value in all lanes, or one in each half.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread<const GROUPS: usize>(x: &[f32; GROUPS]) -> __m256 {
    if GROUPS == 1 { _mm256_set1_ps(x[0]) } else { _mm256_set_m128(_mm_set1_ps(x[1]), _mm_set1_ps(x[0])) }
}

/// As [`spread`], always from memory: the compiler would rather load several at once and spread them from a register.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::isa) fn broadcast<const GROUPS: usize>(x: &[f32; GROUPS]) -> __m256 {
    let one = |x: &f32| {
        let mut y: __m256;
        // SAFETY: reads the four bytes of `x`.
        unsafe {
            asm!(
                "vbroadcastss {}, dword ptr [{}]",
                out(ymm_reg) y,
                in(reg) x,
                options(pure, readonly, nostack, preserves_flags)
            )
        };
        y
    };
    if GROUPS == 1 { one(&x[0]) } else { _mm256_blend_ps::<0xf0>(one(&x[0]), one(&x[1])) }
}

/// An optimization barrier: the same register, about which the compiler knows nothing more. No instruction.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn opaque(mut x: __m256) -> __m256 {
    // SAFETY: the assembly is empty.
    unsafe { asm!("/* {0} */", inout(ymm_reg) x, options(pure, nomem, nostack, preserves_flags)) };
    x
}

/// `sums` and the products of pairs of 16-bit integers. The compiler splits the intrinsic into a multiplication and an
/// addition, unless it is told to tune for one of the CPUs where it knows better.
///
/// # Safety
/// The CPU must have AVX-VNNI. As a feature of this function it would not be inlined into steps, which do not name it.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn add_products(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: computes on registers alone, with an instruction that the CPU has.
    unsafe {
        asm!(
            "{{vex}} vpdpwssd {0}, {1}, {2}",
            inout(ymm_reg) sums, in(ymm_reg) a, in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// `sums` and the products of four unsigned and four signed 8-bit integers.
///
/// # Safety
/// The CPU must have AVX-VNNI, as for [`add_products`].
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn add_byte_products(mut sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: computes on registers alone, with an instruction that the CPU has.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {0}, {1}, {2}",
            inout(ymm_reg) sums, in(ymm_reg) unsigned, in(ymm_reg) signed,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Prefetches the cache line `ahead` bytes after the start of `data`, whether it lies in it or not.
#[inline(always)]
pub(in crate::isa) fn prefetch<T>(data: &[T], ahead: usize) {
    // SAFETY: a prefetch takes any address, and every x86-64 CPU has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().wrapping_add(ahead)) };
}

/// As [`prefetch`], into the second cache. Lines from memory wait there in greater number than at the first, and do not drive
/// out what is in use: the 8x8 product of a vector from DRAM, eight rows at a time, is 1.4 times as fast as with the first.
#[inline(always)]
pub(in crate::isa) fn prefetch_second<T>(data: &[T], ahead: usize) {
    // SAFETY: as in `prefetch`.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().cast::<i8>().wrapping_add(ahead)) };
}

/// As [`store_f32`], but past the caches if the place has an alignment of 16 bytes, as allocators give.
///
/// # Safety
/// Before anything else uses the place, there must be an `_mm_sfence`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn stream_f32(out: &mut [f32; 8], x: __m256) {
    if !out.as_ptr().addr().is_multiple_of(16) {
        return store_f32(out, x);
    }
    let halves = [_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)];
    for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(halves) {
        // SAFETY: the array has the 16 bytes that the store writes, and their alignment; the caller has the fence.
        unsafe { _mm_stream_ps(out.as_mut_ptr(), x) }
    }
}
