//! Loads, stores and small steps that several files share.

use core::arch::asm;
use core::arch::x86_64::*;

use half::{bf16, f16};

/// [`crate::spec::add_lanes`] of the lanes of a register.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_lanes(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
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
pub(super) fn broadcast<const GROUPS: usize>(x: &[f32; GROUPS]) -> __m256 {
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

/// A load that stays where it is, for loops that need every register.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_again(x: &__m256i) -> __m256i {
    let y: __m256i;
    // SAFETY: reads the 32 bytes of `x`.
    unsafe {
        asm!("vmovdqa {}, ymmword ptr [{}]", out(ymm_reg) y, in(reg) x, options(readonly, nostack, preserves_flags))
    };
    y
}

/// The same vector, of which the compiler knows nothing more. No instruction.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn opaque(mut x: __m256) -> __m256 {
    // SAFETY: the assembly is empty.
    unsafe { asm!("/* {0} */", inout(ymm_reg) x, options(pure, nomem, nostack, preserves_flags)) };
    x
}

/// Asks for the cache line `ahead` bytes after the start of `bytes`, theirs or not.
#[inline(always)]
pub(super) fn prefetch(bytes: &[u8], ahead: usize) {
    // SAFETY: a prefetch takes any address; every x86-64 processor has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) };
}

/// Bits of the absolute values.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn abs_bits(x: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff))
}

/// The largest of eight unsigned integers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn largest_u32(x: __m256i) -> u32 {
    let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b0100_1110>(x));
    let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b1011_0001>(x));
    _mm_cvtsi128_si32(x).cast_unsigned()
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_bf16(x: &[bf16; 8]) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_u16(x))))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load_f16(x: &[f16; 8]) -> __m256 {
    _mm256_cvtph_ps(load_u16(x))
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> __m256 {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_i16(x: &[i16; 16]) -> __m256i {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_256(x: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_128(x: &[u8; 16]) -> __m128i {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

/// Eight 16-bit values of any type.
#[target_feature(enable = "avx2")]
#[inline]
fn load_u16<T: Half>(x: &[T; 8]) -> __m128i {
    // SAFETY: the array has the 16 bytes that an unaligned load reads, for `Half` types have two.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: __m256) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}

/// As [`store_f32`], past the caches if that can be: if the place has 16 bytes of alignment, as allocators give.
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

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_i16(out: &mut [i16; 16], x: __m256i) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_u16<T: Half>(out: &mut [T; 16], x: __m256i) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes, for `Half` types have two and take any bits.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store_128(out: &mut [u8; 16], x: __m128i) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), x) }
}

/// The two types of 16 bits that any bit pattern is a value of.
pub(super) trait Half {}
impl Half for f16 {}
impl Half for bf16 {}
const _: () = assert!(size_of::<f16>() == 2 && size_of::<bf16>() == 2);
