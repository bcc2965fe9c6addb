//! Whether the CPU has AVX2, and F16C, which converts f16: every one with AVX2 has it, but nothing says that it must.

#![expect(unsafe_code, reason = "asks the CPU by an intrinsic that is an unsafe function in older versions of Rust")]

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

cpufeatures::new!(avx2, "avx2");

/// Whether the CPU has AVX2 and F16C.
pub(in crate::isa) fn is_supported() -> bool {
    // 0 is not known yet, 1 no, 2 yes. `cpuid` is slow under a hypervisor.
    static F16C: AtomicU8 = AtomicU8::new(0);
    const BIT: u32 = 1 << 29;
    if cfg!(all(target_feature = "avx2", target_feature = "f16c")) {
        return true;
    }
    // In an SGX enclave there is no `cpuid`, and only what was compiled in is known; so it is with `cpufeatures`.
    if cfg!(target_env = "sgx") || !avx2::get() {
        return false;
    }
    if F16C.load(Relaxed) == 0 {
        // SAFETY: every x86-64 CPU outside of an enclave has `cpuid`, with this leaf.
        #[allow(unused_unsafe, reason = "the function is safe in newer versions of Rust")]
        let features = unsafe { __cpuid(1) }.ecx;
        F16C.store(1 + u8::from(features & BIT != 0), Relaxed);
    }
    F16C.load(Relaxed) == 2
}
