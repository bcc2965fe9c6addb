//! Which instruction sets for x86-64 this CPU has, and the operating system saves the registers of. The CPU is asked
//! once, without `std`, because `cpuid` is slow under a hypervisor.

#![expect(unsafe_code, reason = "asks the CPU by an intrinsic that is an unsafe function in older versions of Rust")]

use core::arch::x86_64::{__cpuid_count, CpuidResult};
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

// These ask the operating system too.
cpufeatures::new!(avx2, "avx2");
cpufeatures::new!(avx512, "avx512f", "avx512bw", "avx512vl");

/// Every CPU with AVX2 has F16C, which converts f16, but nothing says that it must.
static F16C: Feature = Feature::new(1, 0, |leaf| leaf.ecx, 29);
static AVX512_VNNI: Feature = Feature::new(7, 0, |leaf| leaf.ecx, 11);
/// The first four letters of `GenuineIntel`.
static INTEL: Feature = Feature::new(0, 0, |leaf| u32::from(leaf.ebx == u32::from_le_bytes(*b"Genu")), 0);
static AVX_VNNI: Feature = Feature::new(7, 1, |leaf| leaf.eax, 4);

/// Whether the CPU has AVX2 and F16C.
pub(super) fn has_avx2() -> bool {
    cfg!(all(target_feature = "avx2", target_feature = "f16c")) || (avx2::get() && F16C.get())
}

/// Whether the CPU has AVX2, F16C and AVX-VNNI.
pub(super) fn has_avx_vnni() -> bool {
    has_avx2() && (cfg!(target_feature = "avxvnni") || AVX_VNNI.get())
}

/// Whether the CPU has AVX2, F16C and, of AVX-512, F, BW, VL and VNNI.
pub(super) fn has_avx512_vnni() -> bool {
    has_avx2() && avx512::get() && (cfg!(target_feature = "avx512vnni") || AVX512_VNNI.get())
}

/// As [`has_avx512_vnni`], and whether it is one of Intel's, where `vpermw` is slow.
pub(super) fn has_avx512_vnni_of_intel() -> bool {
    has_avx512_vnni() && INTEL.get()
}

/// A bit of what `cpuid` returns, that `cpufeatures` does not know.
struct Feature {
    leaf: u32,
    subleaf: u32,
    register: fn(CpuidResult) -> u32,
    bit: u32,
    /// 0 is not known yet, 1 no, 2 yes.
    known: AtomicU8,
}

impl Feature {
    const fn new(leaf: u32, subleaf: u32, register: fn(CpuidResult) -> u32, bit: u32) -> Self {
        Self { leaf, subleaf, register, bit, known: AtomicU8::new(0) }
    }

    /// Whether the CPU has it, which must be one with AVX2: so it knows the leaf, and of a part of it that it does not
    /// know returns zeros.
    fn get(&self) -> bool {
        // In an SGX enclave there is no `cpuid`, and only what was compiled in is known; so it is with `cpufeatures`.
        if cfg!(target_env = "sgx") {
            return false;
        }
        if self.known.load(Relaxed) == 0 {
            // SAFETY: every x86-64 CPU outside of an enclave has `cpuid`.
            #[allow(unused_unsafe, reason = "the function is safe in newer versions of Rust")]
            let leaf = unsafe { __cpuid_count(self.leaf, self.subleaf) };
            self.known.store(1 + u8::from((self.register)(leaf) >> self.bit & 1 == 1), Relaxed);
        }
        self.known.load(Relaxed) == 2
    }
}
