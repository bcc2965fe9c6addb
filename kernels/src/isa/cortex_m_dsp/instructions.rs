//! Instructions of the DSP extension: their intrinsics are not stable.

#![expect(unsafe_code, reason = "single instructions of assembly")]

use core::arch::asm;

/// Two 16-bit numbers in a register; from memory that is one load.
#[inline(always)]
pub(super) fn join([low, high]: [i16; 2]) -> u32 {
    u32::from(low.cast_unsigned()) | u32::from(high.cast_unsigned()) << 16
}

/// The sum of the products of the two low and of the two high halves, as signed numbers.
#[inline(always)]
pub(super) fn smuad(a: u32, b: u32) -> i32 {
    let sum;
    // SAFETY: the core has the DSP extension, or this file is not compiled; the instruction only computes a register
    // from registers. (The flag Q, which it sets if the sum overflows, stays as it is: a lane has no such sum.)
    unsafe {
        asm!(
            "smuad {}, {}, {}",
            lateout(reg) sum,
            in(reg) a,
            in(reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// As [`smuad`], plus `sum`.
#[inline(always)]
pub(super) fn smlad(a: u32, b: u32, sum: i32) -> i32 {
    let total;
    // SAFETY: as in `smuad`.
    unsafe {
        asm!(
            "smlad {}, {}, {}, {}",
            lateout(reg) total,
            in(reg) a,
            in(reg) b,
            in(reg) sum,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    total
}

/// The bytes 0 and 2, as signed numbers of 16 bits.
#[inline(always)]
pub(super) fn sxtb16(x: u32) -> u32 {
    let pair;
    // SAFETY: as in `smuad`.
    unsafe {
        asm!(
            "sxtb16 {}, {}",
            lateout(reg) pair,
            in(reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    pair
}

/// The bytes 1 and 3, as signed numbers of 16 bits.
#[inline(always)]
pub(super) fn sxtb16_ror_8(x: u32) -> u32 {
    let pair;
    // SAFETY: as in `smuad`.
    unsafe {
        asm!(
            "sxtb16 {}, {}, ror #8",
            lateout(reg) pair,
            in(reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    pair
}

/// As two of [`smlad`], which stay where they are: told that they only compute (`pure`), the compiler would multiply a whole
/// group of one row first, and store all activations on the stack for the next row.
#[inline(always)]
pub(super) fn smlad_twice(a: [u32; 2], b: [u32; 2], mut sum: i32) -> i32 {
    // SAFETY: as in `smuad`.
    unsafe {
        asm!(
            "smlad {sum}, {}, {}, {sum}",
            "smlad {sum}, {}, {}, {sum}",
            in(reg) a[0],
            in(reg) b[0],
            in(reg) a[1],
            in(reg) b[1],
            sum = inout(reg) sum,
            options(nomem, nostack, preserves_flags),
        );
    }
    sum
}
