//! Which instruction sets for aarch64 this CPU has beyond NEON. No instruction tells a program: the operating system is
//! asked, without `std`, and once. Where nobody can be asked, it is what the crate was compiled for.

use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use cfg_if::cfg_if;

static DOTPROD: AtomicU8 = AtomicU8::new(UNKNOWN);
static I8MM: AtomicU8 = AtomicU8::new(UNKNOWN);

const UNKNOWN: u8 = 0;
const MISSING: u8 = 1;
const THERE: u8 = 2;

/// Whether the CPU has `dotprod`.
pub(super) fn has_dotprod() -> bool {
    cfg!(target_feature = "dotprod") || once(&DOTPROD, system::has_dotprod)
}

/// Whether the CPU has `dotprod` and `i8mm`.
pub(super) fn has_i8mm() -> bool {
    has_dotprod() && (cfg!(target_feature = "i8mm") || once(&I8MM, system::has_i8mm))
}

fn once(known: &AtomicU8, ask: fn() -> bool) -> bool {
    if known.load(Relaxed) == UNKNOWN {
        known.store(if ask() { THERE } else { MISSING }, Relaxed);
    }
    known.load(Relaxed) == THERE
}

cfg_if! {
    if #[cfg(any(target_os = "linux", target_os = "android"))] {
        #[expect(unsafe_code, reason = "asks the operating system by a function of C")]
        mod system {
            use libc::{AT_HWCAP, AT_HWCAP2, HWCAP_ASIMDDP, c_ulong, getauxval};

            /// Of Linux's `asm/hwcap.h`; `libc` does not have it everywhere.
            const HWCAP2_I8MM: c_ulong = 1 << 13;

            pub(super) fn has_dotprod() -> bool {
                // SAFETY: takes any number.
                unsafe { getauxval(AT_HWCAP) & HWCAP_ASIMDDP != 0 }
            }

            pub(super) fn has_i8mm() -> bool {
                // SAFETY: takes any number.
                unsafe { getauxval(AT_HWCAP2) & HWCAP2_I8MM != 0 }
            }
        }
    } else if #[cfg(target_vendor = "apple")] {
        #[expect(unsafe_code, reason = "asks the operating system by a function of C")]
        mod system {
            use core::ffi::CStr;
            use core::ptr;

            pub(super) fn has_dotprod() -> bool {
                is_set(c"hw.optional.arm.FEAT_DotProd")
            }

            pub(super) fn has_i8mm() -> bool {
                is_set(c"hw.optional.arm.FEAT_I8MM")
            }

            /// Whether the system knows the name, and says 1.
            fn is_set(name: &CStr) -> bool {
                let (mut value, mut len) = (0_i32, size_of::<i32>());
                let out = ptr::from_mut(&mut value).cast();
                // SAFETY: the name ends with 0, `out` has room for `len` bytes, and nothing is set.
                let status = unsafe { libc::sysctlbyname(name.as_ptr(), out, &raw mut len, ptr::null_mut(), 0) };
                status == 0 && value == 1
            }
        }
    } else {
        mod system {
            pub(super) fn has_dotprod() -> bool {
                false
            }

            pub(super) fn has_i8mm() -> bool {
                false
            }
        }
    }
}
