//! aarch64 with NEON. Nothing is detected: this file is compiled only for targets that have it.
//!
//! The step of the 16x4 product, for 16 packed bytes (32 weights, half of the lanes); a span of 64 columns takes two:
//!
//! ```text
//! even = bytes >> 4                         codes of columns 0, 2, .. 30
//! odd  = bytes & 15                         codes of columns 1, 3, .. 31
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      tbl: the two bytes of each 16-bit weight
//!     w0, w1 = zip(lo, hi)                  8 weights each: w0 bytes 0-7, w1 bytes 8-15
//!     a += w0[0..4] * q0[0..4] + w1[0..4] * q1[0..4]
//!     b += w0[4..8] * q0[4..8] + w1[4..8] * q1[4..8]
//! sums = addp(a, b)                         a0 + a1, a2 + a3, b0 + b1, b2 + b3
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!                 first 16 bytes                second 16 bytes
//!            a0 a1  a2 a3  b0 b1  b2 b3     a0 a1  a2 a3  b0 b1  b2 b3
//! w0 (even)   0  2 | 4  6 | 8 10 |12 14     32 34 |36 38 |40 42 |44 46
//! w1 (even)  16 18 |20 22 |24 26 |28 30     48 50 |52 54 |56 58 |60 62
//! lane         0      1      2      3         4      5      6      7
//! ```
//!
//! Integer sums are exact in any order, so neighbours are added once, at the end.
//!
//! The f32 paths look up the four bytes of each f32 and zip them twice: looking up whole f32 would take a `tbl` of four
//! registers, slow on many cores, for every four weights.
//!
//! A sum of products is two operations everywhere: the single rounding of `fmla` would give other bits.

mod activations;
mod dense;
mod dequantize;
mod gemm;
mod gemm_f32;
mod gemv;
mod gemv_f32;
mod quantize;
mod transposed;
mod vector;

use crate::kernels::Table;
use crate::{Isa, double_quant};

pub(crate) static TABLE: Table = Table {
    isa: Isa::Neon,
    quantize_f32: quantize::quantize_f32,
    quantize_f16: quantize::quantize_f16,
    quantize_bf16: quantize::quantize_bf16,
    dequantize_f32: dequantize::dequantize_f32,
    dequantize_f16: dequantize::dequantize_f16,
    dequantize_bf16: dequantize::dequantize_bf16,
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    quantize_activations: activations::quantize_activations,
    gemv: gemv::gemv,
    gemv_f32: gemv_f32::gemv_f32,
    gemm: gemm::gemm,
    gemm_f32: gemm_f32::gemm_f32,
    gemv_transposed_f32: transposed::gemv_transposed_f32,
    gemv_dense: dense::gemv_dense,
};
