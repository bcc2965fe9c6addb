//! Tests in a floating-point environment other than the default one, in which a block of zeros must stay one.

#![expect(unsafe_code, reason = "sets the control register of the floating-point unit")]

use core::arch::asm;

use crate::{BlockSize, Kernels};

/// Subnormal results become zeros (bit 15), and so do subnormal inputs (bit 6).
const FLUSH: u32 = 1 << 15 | 1 << 6;

fn control() -> u32 {
    let mut control = 0_u32;
    // SAFETY: writes the four bytes of `control`.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}

fn set_control(control: u32) {
    // SAFETY: reads the four bytes of `control`. The test sets what was there before any other test can see it: the
    // register belongs to the thread.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags)) };
}

#[test]
fn zeros_are_zeros_where_subnormal_numbers_are_flushed() {
    for k in Kernels::available() {
        for (len, zero) in [(128_usize, 0.0_f32), (128, -0.0), (96, 0.0), (7, -0.0)] {
            let (mut packed, mut absmax) = ([0; 64], [9.0; 2]);
            let (packed, absmax) = (&mut packed[..len.div_ceil(2)], &mut absmax[..BlockSize::B64.blocks(len)]);
            let before = control();
            set_control(before | FLUSH);
            let result = k.quantize(&[zero; 128][..len], BlockSize::B64, packed, absmax);
            set_control(before);
            assert_eq!(result, Ok(()));
            assert!(packed.iter().all(|byte| *byte == 0x77), "{len} zeros on {}: {packed:x?}", k.isa());
            let expected = |block| if (block + 1) * 64 <= len { 0.0 } else { 1e-38_f32 };
            assert!(absmax.iter().enumerate().all(|(block, a)| a.to_bits() == expected(block).to_bits()), "{absmax:?}");
        }
    }
}
