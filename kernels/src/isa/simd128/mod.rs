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
//! The step of the 8x8 product, for a group of 32 columns in four rows, 16 packed bytes each (`steps_8x8.rs`):
//!
//! ```text
//! for each row:
//!     for codes in [bytes >> 4, bytes & 15]:
//!         w = BOOK[codes]                       i8x16.swizzle
//!         sums[row] += dot(w << 8, q0) + dot(w & 0xff00, q1)
//! lanes = sums across, one for each row, >> 8
//! total += f32(lanes) * (absmax * scale)
//! ```
//!
//! A batch has rows in lanes from the start, and needs no sums across.
//!
//! The f32 paths look up the four bytes of each f32 and zip them twice. A sum of products is two operations everywhere:
//! the relaxed instructions, which may fuse them, give bits that depend on the machine.
//!
#![doc = include_str!("../../../asm/simd128.md")]

mod codes;
mod conversions;
mod entries;
mod registers;
mod steps_16x4;
mod steps_8x8;
mod steps_f32;
mod steps_transposed;

use core::arch::wasm32::v128;

use super::table::{Isa, Table};
use crate::double_quant;
use crate::spec::SPAN;

pub(super) static TABLE: Table = Table {
    isa: Isa::Simd128,
    slots: &SLOTS,
    f32: entries::floats(),
    f16: entries::floats(),
    bf16: entries::floats(),
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    gemv: entries::gemv,
    gemm: entries::gemm,
    slots_8x8: &SLOTS,
    gemv_8x8: entries::gemv_8x8,
    gemm_8x8: entries::gemm_8x8,
    gemv_transposed_f32: entries::gemv_transposed_f32,
    gemm_transposed_f32: entries::gemm_transposed_f32,
    quantize_gradients: entries::quantize_gradients,
    gemm_transposed: entries::gemm_transposed,
    gemm_dense_add: entries::gemm_dense_add,
    gemm_transposed_dense_add: entries::gemm_transposed_dense_add,
};

/// First the even columns (high nibbles), then the odd ones, in both products.
static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a slot is below 64")]
        {
            slots[column] = (column % 2 * 32 + column / 2) as u8;
        }
        column += 1;
    }
    slots
};

/// Tables for look-ups.
struct Simd128 {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [v128; 2],
    /// The 8x8 codebook.
    i8_book: v128,
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [v128; 4],
}
