//! x86-64 with AVX2, and F16C for f16.
//!
//! The step of the 16x4 product, for 32 packed bytes (64 weights, two 128-bit halves):
//!
//! ```text
//! even = bytes >> 4 & 15                    codes of columns 0, 2, .. 62
//! odd  = bytes & 15                         codes of columns 1, 3, .. 63
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      vpshufb: the two bytes of each 16-bit weight
//!     w0, w1 = unpack(lo, hi)               8 weights a half: w0 bytes 0-7 and 16-23, w1 bytes 8-15 and 24-31
//!     sums += pmadd(w0, q) + pmadd(w1, q)   32-bit lane l: weights 2l, 2l+1 of its half
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!               half 0                         half 1
//! w0 (even)  0 2 | 4 6 | 8 10 | 12 14      32 34 | 36 38 | 40 42 | 44 46
//! w1 (even) 16 18|20 22|24 26 | 28 30      48 50 | 52 54 | 56 58 | 60 62
//! lane         0    1     2      3            4      5      6      7
//! ```
//!
//! The f32 products look up the four bytes of each f32 and unpack them twice, which takes fewer instructions than two
//! look-ups by `vpermps` and a blend, and put the inputs into that order once for all rows.

mod activations;
mod dense;
mod dequantize;
mod products;
mod products_f32;
mod quantize;
mod steps;
mod vector;

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::kernels::Table;
use crate::{Isa, double_quant};

cpufeatures::new!(avx2, "avx2");

/// Whether the processor has AVX2, and F16C, which converts f16: every one with AVX2 has it, but nothing says that it
/// must.
pub(crate) fn is_supported() -> bool {
    /// 0 is not known yet, 1 no, 2 yes. `cpuid` is slow under a hypervisor.
    static F16C: AtomicU8 = AtomicU8::new(0);
    const BIT: u32 = 1 << 29;
    if !avx2::get() {
        return false;
    }
    if F16C.load(Relaxed) == 0 {
        // SAFETY: every x86-64 processor has `cpuid`, with this leaf.
        #[allow(unused_unsafe, reason = "the function is safe in newer versions of Rust")]
        let features = unsafe { __cpuid(1) }.ecx;
        F16C.store(1 + u8::from(features & BIT != 0), Relaxed);
    }
    F16C.load(Relaxed) == 2
}

pub(crate) static TABLE: Table = Table {
    isa: Isa::Avx2,
    quantize_f32: quantize::quantize_f32,
    quantize_f16: quantize::quantize_f16,
    quantize_bf16: quantize::quantize_bf16,
    dequantize_f32: dequantize::dequantize_f32,
    dequantize_f16: dequantize::dequantize_f16,
    dequantize_bf16: dequantize::dequantize_bf16,
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    quantize_activations: activations::quantize_activations,
    gemv: steps::gemv,
    gemv_f32: steps::gemv_f32,
    gemm: steps::gemm,
    gemm_f32: steps::gemm_f32,
    gemv_transposed_f32: steps::gemv_transposed_f32,
    gemv_dense: dense::gemv_dense,
};
