//! WebAssembly with 128-bit SIMD. Nothing is detected: a module that holds an instruction which its engine does not
//! know is refused as a whole, so this file is compiled only for targets that have the feature. For the same reason no
//! function here needs `#[target_feature]`.
//!
//! The step of the 16x4 product, for 16 packed bytes (32 weights, half of the lanes); a span of 64 columns takes two:
//!
//! ```text
//! even = bytes >> 4                         codes of columns 0, 2, .. 30
//! odd  = bytes & 15                         codes of columns 1, 3, .. 31
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      i8x16.swizzle: the two bytes of each 16-bit weight
//!     w0, w1 = zip(lo, hi)                  i8x16.shuffle, 8 weights each: w0 bytes 0-7, w1 bytes 8-15
//!     sums += dot(w0, q0) + dot(w1, q1)     i32x4.dot_i16x8_s, lane l: weights 2l and 2l + 1
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!                first 16 bytes               second 16 bytes
//! w0 (even)   0  2 | 4  6 | 8 10 |12 14     32 34 |36 38 |40 42 |44 46
//! w1 (even)  16 18 |20 22 |24 26 |28 30     48 50 |52 54 |56 58 |60 62
//! lane         0      1      2      3         4      5      6      7
//! ```
//!
//! The f32 paths look up the four bytes of each f32 and zip them twice. A sum of products is two operations everywhere:
//! the relaxed instructions, which may fuse them, give bits that depend on the machine.

mod activations;
mod dense;
mod dequantize;
mod products;
mod products_f32;
mod quantize;
mod steps;
mod vector;

use crate::kernels::Table;
use crate::{Isa, double_quant};

pub(crate) static TABLE: Table = Table {
    isa: Isa::Simd128,
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
