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
//!
#![doc = include_str!("../../../asm/avx2.md")]
#![doc = include_str!("../../../asm/avx-vnni.md")]

mod codes;
mod conversions;
mod entries;
mod registers;
mod steps_16x4;
mod steps_8x8;
mod steps_f32;
mod steps_transposed;

use core::arch::x86_64::__m256i;

pub(super) use entries::{avx2, gemm_f32};
pub(super) use registers::{broadcast, prefetch, prefetch_second};
pub(super) use steps_8x8::add_lanes_of_four;
pub(super) use steps_16x4::spread_products;

use super::table::{FloatTable, Isa, Table};
use crate::double_quant;
use crate::spec::SPAN;

pub(super) static TABLE: Table = Table {
    isa: Isa::Avx2,
    slots: &SLOTS,
    f32: FloatTable { dequantize: entries::dequantize_f32, ..entries::floats() },
    f16: entries::floats(),
    bf16: entries::floats(),
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    gemv: entries::gemv,
    gemm: entries::gemm,
    slots_8x8: &SLOTS_8X8,
    gemv_8x8: entries::gemv_8x8,
    gemm_8x8: entries::gemm_8x8,
    gemv_transposed_f32: entries::gemv_transposed_f32,
    gemm_transposed_f32: entries::gemm_transposed_f32,
    quantize_gradients: entries::quantize_gradients,
    gemm_transposed: entries::gemm_transposed,
    gemm_dense_add: entries::gemm_dense_add,
    gemm_transposed_dense_add: entries::gemm_transposed_dense_add,
};

/// With AVX-VNNI, whose `vpdpwssd` is a `vpmaddwd` and a `vpaddd`, and whose `vpdpbusd` takes the place of five
/// instructions.
pub(super) static AVX_VNNI: Table = Table {
    isa: Isa::AvxVnni,
    gemv: entries::gemv_vnni,
    gemm: entries::gemm_vnni,
    gemv_8x8: entries::gemv_8x8_vnni,
    gemm_8x8: entries::gemm_8x8_vnni,
    ..TABLE
};

/// First the even columns (high nibbles), then the odd ones; within each, bytes 0-7, 16-23, 8-15, 24-31. That is what
/// two `vpunpck` of the two byte planes leave in 256-bit registers, so nothing has to be shuffled.
static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        let (byte, odd) = (column / 2, column % 2);
        let piece = [0, 2, 1, 3][byte / 8];
        #[allow(clippy::cast_possible_truncation, reason = "a slot is below 64")]
        {
            slots[column] = (odd * 32 + piece * 8 + byte % 8) as u8;
        }
        column += 1;
    }
    slots
};

/// First the even columns, then the odd ones, each in the order of the bytes.
static SLOTS_8X8: [u8; SPAN] = {
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

/// Tables for look-ups, each in both halves of a register. `VNNI` says whether the CPU has AVX-VNNI too.
pub(super) struct Avx2<const VNNI: bool = false> {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [__m256i; 2],
    /// The 8x8 codebook; with AVX-VNNI larger by 128.
    i8_book: __m256i,
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [__m256i; 4],
}
