//! aarch64 with NEON. It is not detected: this is compiled only for targets that have it. What it may have beyond, `dotprod`
//! and `i8mm`, is detected, and only multiplies 8x8.
//!
//! The step of the 16x4 product, for 16 packed bytes (32 weights, half of the lanes); a span of 64 columns takes two:
//!
//! ```text
//! even = bytes >> 4                         codes of columns 0, 2, .. 30
//! odd  = bytes & 15                         codes of columns 1, 3, .. 31
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      tbl: the two bytes of each 16-bit weight
//!     w0, w1 = trn(lo, hi)                  8 weights each: w0 bytes 0, 2, .. 14, w1 bytes 1, 3, .. 15
//!     sums += w0[0..4] * q0[0..4] + w0[4..8] * q0[4..8]
//!     sums += w1[0..4] * q1[0..4] + w1[4..8] * q1[4..8]
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!              first 16 bytes             second 16 bytes
//! w0 (even)    0  4  8 12 16 20 24 28     32 36 40 44 48 52 56 60
//! w0 (odd)     1  5  9 13 17 21 25 29     33 37 41 45 49 53 57 61
//! w1 (even)    2  6 10 14 18 22 26 30     34 38 42 46 50 54 58 62
//! w1 (odd)     3  7 11 15 19 23 27 31     35 39 43 47 51 55 59 63
//! lane         0  1  2  3  0  1  2  3      4  5  6  7  4  5  6  7
//! ```
//!
//! So a span takes 42 vector instructions, and a scalar one for the product of absmax and scale: 4 for the nibbles, 8
//! `tbl`, 8 `trn`, 16 widening multiplications, and 6 that scale and add the two registers of lanes. None can be
//! spared. A multiplication gives four products of 32 bits. Each of the eight registers of weights takes one
//! instruction that brings two bytes of a weight together and one for what that is given: planes looked up, or, for a
//! `tbl` of two registers, pairs of indices. Each of the four registers of codes takes one instruction, for `tbl` needs
//! the other nibble out of the way. Dot products of bytes (`dotprod`, `i8mm`) do not help: four products of bytes make
//! one of 16 bits by 14, which takes as many instructions, and six more to join them, for the eight `trn` that they
//! save.
//!
//! The step of the 8x8 product, for a group of 32 columns in four rows, 16 packed bytes each (`add_group`):
//!
//! ```text
//! for each row:
//!     even, odd = BOOK[bytes >> 4], BOOK[bytes & 15]     tbl: 16 weights each
//!     sums[row] = even . x_even + odd . x_odd            sdot: of four columns in each lane; or smull, smlal, sadalp
//! lanes = sums across, one for each row                  addp, three times
//! total += f32(lanes) * (absmax * scale)
//! ```
//!
//! A batch has the weights of 32 rows in a panel, in an order that needs no sums across:
//!
//! ```text
//!                     a register of weights      multiplied with                       gives
//! sdot (by element)   four columns of 4 rows     four columns of one vector            4 rows
//! smmla               eight columns of 2 rows    eight columns of 2 vectors, zipped    2 rows of 2 vectors
//! smull and sadalp    16 columns of a row        16 columns of a vector                a part in each lane: addp
//! ```
//!
//! The f32 paths look up the four bytes of each f32 and zip them twice: looking up whole f32 would take a `tbl` of four
//! registers, slow on many cores, for every four weights.
//!
//! A sum of products is two operations everywhere: the single rounding of `fmla` would give other bits.
//!
#![doc = include_str!("../../../asm/neon.md")]
#![doc = include_str!("../../../asm/neon-dotprod.md")]
#![doc = include_str!("../../../asm/neon-i8mm.md")]

mod codes;
mod conversions;
mod dotprod;
mod entries;
mod i8mm;
mod registers;
mod steps_16x4;
mod steps_8x8;
mod steps_f32;
mod steps_transposed;

use core::arch::aarch64::uint8x16_t;

use super::table::{Isa, Table};
use crate::double_quant;
use crate::spec::SPAN;

pub(super) static TABLE: Table = Table {
    isa: Isa::Neon,
    slots: &SLOTS,
    f32: entries::floats(),
    f16: entries::floats(),
    bf16: entries::floats(),
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    gemv: entries::gemv,
    gemm: entries::gemm,
    slots_8x8: &EVEN_AND_ODD,
    gemv_8x8: entries::gemv_8x8,
    gemm_8x8: entries::gemm_8x8,
    gemv_transposed_f32: entries::gemv_transposed_f32,
    gemm_transposed_f32: entries::gemm_transposed_f32,
    quantize_gradients: entries::quantize_gradients,
    gemm_transposed: entries::gemm_transposed,
    gemm_dense_add: entries::gemm_dense_add,
    gemm_transposed_dense_add: entries::gemm_transposed_dense_add,
};

/// With `dotprod`, whose `sdot` adds four products of 8-bit integers to each lane.
pub(super) static DOTPROD: Table =
    Table { isa: Isa::NeonDotprod, gemv_8x8: entries::gemv_8x8_dotprod, gemm_8x8: entries::gemm_8x8_dotprod, ..TABLE };

/// With `dotprod` and `i8mm`, whose `smmla` multiplies two rows of eight 8-bit integers with two others.
pub(super) static I8MM: Table = Table { isa: Isa::NeonI8mm, gemm_8x8: entries::gemm_8x8_i8mm, ..DOTPROD };

/// Each half of the span stands by itself, first every fourth column from the first on, then from the second on, and so
/// on. That is what `trn` of the two byte planes leave. The columns of elements `i` and `i + 4` of such a piece belong to
/// the same lane, so the widening multiplications of both its halves add to the same sums.
static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a slot is below 64")]
        {
            slots[column] = (column / 32 * 32 + column % 4 * 8 + column % 32 / 4) as u8;
        }
        column += 1;
    }
    slots
};

/// Of each half of the span first the even columns, then the odd ones: the order in which packed bytes are decoded. The
/// activations of the 8x8 product stand in it, and the inputs of the f32 product.
static EVEN_AND_ODD: [u8; SPAN] = even_and_odd();

const fn even_and_odd() -> [u8; SPAN] {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a slot is below 64")]
        {
            slots[column] = (column / 32 * 32 + column % 2 * 16 + column % 32 / 2) as u8;
        }
        column += 1;
    }
    slots
}

/// Tables for look-ups.
struct Neon {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [uint8x16_t; 2],
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [uint8x16_t; 4],
}
