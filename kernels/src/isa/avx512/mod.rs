//! x86-64 with AVX-512 and its VNNI: the 16x4 and 8x8 products, the transposed ones, and the f32 products of batches. All
//! else is that of AVX2, with its order of activations.
//!
//! `vpermw` looks 16-bit weights up by codes whose upper bits it ignores, and `vpdpwssd` adds the two products of each
//! 32-bit lane to a sum. A few vectors take a row at a time, in registers of 256 bits (`steps_16x4.rs`): a Zen 4 looks up
//! as many words with them, and two rows in a register of 512 bits have to be put together first. CPUs of Intel, where
//! `vpermw` takes two instructions of the one port that permutes, look up as AVX2 does. The step for 32 packed bytes, two
//! halves of 128 bits:
//!
//! ```text
//! low, high = unpack(bytes, bytes)          16-bit words b0 b0, b1 b1, .. b7 b7 and b8 b8, .. b15 b15 of a half
//! w0, w1 = BOOK[low >> 4], BOOK[high >> 4]  vpermw: even columns
//! w2, w3 = BOOK[low], BOOK[high]            odd columns
//! sums = w0 q0 + w1 q1 + (w2 q2 + w3 q3)
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!          half 0                         half 1
//! w0    0 2 | 4 6 | 8 10 | 12 14      32 34 | 36 38 | 40 42 | 44 46
//! w1   16 18|20 22|24 26 | 28 30      48 50 | 52 54 | 56 58 | 60 62
//! lane   0    1     2      3            4      5      6      7
//! ```
//!
//! A larger batch puts sixteen rows into a register, and takes one lane after the other (`panel.rs`). The step for a lane
//! of a span:
//!
//! ```text
//! factors = absmax * scale                  of sixteen rows, for all lanes of a group
//! sums = 0
//! for i in 0..4:                            pairs of columns of the lane
//!     sums += w[i] * broadcast(q[i])        w[i] is decoded: a pair of weights of each row
//! lane += f32(sums) * factors
//! ```
//!
//! ```text
//!              row 0   row 1   row 2  ..  row 15
//! lane 0  w0    0 2     0 2     0 2        0 2        times the activations of columns 0 and 2
//!         w1   16 18   16 18   16 18      16 18
//!         w2    1 3     1 3     1 3        1 3
//!         w3   17 19   17 19   17 19      17 19
//! lane 1  w0    4 6     4 6     ..
//! ```
//!
#![doc = include_str!("../../../asm/avx512-vnni.md")]
#![expect(unsafe_code, reason = "proves that the CPU has what these functions are compiled for")]

mod codes;
mod columns;
mod panel;
mod panel_f32;
mod registers;
mod steps_16x4;
mod steps_8x8;
mod steps_transposed;

use core::arch::x86_64::{__m256i, __m512i, _mm512_broadcast_i32x4};

use bytemuck::must_cast;

use super::avx2::{self, Avx2};
use super::simd::planes::UNSIGNED_BOOK_I8;
use super::simd::steps::Steps;
use super::simd::{
    batch_8x8, batch_16x4, product_8x8, product_16x4, product_columns, product_transposed, transposed_16x4,
};
use super::table::{FloatTable, Isa, Table};
use crate::activations::{Activations, Activations8x8};
use crate::gradients::Gradients;
use crate::matrix::Nf4Matrix;
use crate::spec::CODEBOOK_I16;

pub(super) static TABLE: Table = Table {
    isa: Isa::Avx512Vnni,
    gemv: gemv::<true>,
    gemm: gemm::<true>,
    gemv_8x8,
    gemm_8x8,
    f32: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.f32 },
    f16: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.f16 },
    bf16: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.bf16 },
    gemm_transposed_f32,
    gemm_transposed,
    gemm_dense_add,
    gemm_transposed_dense_add,
    ..avx2::TABLE
};

/// For CPUs of Intel.
pub(super) static INTEL: Table = Table { gemv: gemv::<false>, gemm: gemm::<false>, ..TABLE };

/// Tables for look-ups, and AVX2 for what this is not better at. `WORDS` says whether the 16x4 product of a few vectors
/// looks up words, or the two bytes of each.
struct Avx512<const WORDS: bool = true> {
    avx2: Avx2,
    /// The 16x4 codebook.
    i16_book: __m256i,
    /// The 8x8 codebook, larger by 128, in each 128 bits.
    i8_book: __m512i,
}

#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn steps<const WORDS: bool>() -> Steps<Avx512<WORDS>> {
    let steps = Avx512 {
        avx2: avx2::avx2(),
        i16_book: must_cast(CODEBOOK_I16),
        i8_book: _mm512_broadcast_i32x4(must_cast(UNSIGNED_BOOK_I8)),
    };
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(steps) }
}

/// The 16x4 product of a row-aligned matrix and a vector.
#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemv<const WORDS: bool>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    product_16x4::gemv(&steps::<WORDS>(), matrix, activations, out);
}

/// From this batch on, decoding into a panel is faster.
const PANEL_BATCH: usize = 12;

/// The 16x4 product of a row-aligned matrix and a batch.
#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm<const WORDS: bool>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.batch() == 1 {
        gemv::<WORDS>(matrix, activations, out);
    } else if activations.batch() < PANEL_BATCH {
        batch_16x4::gemm_eights(&steps::<WORDS>(), matrix, activations, out);
    } else if let Ok((panels, rest)) = matrix.split_at_row(rows_in_panels(matrix.rows())) {
        let (out, out_rest) = out.split_at_mut(panels.rows() * activations.batch());
        panel::gemm(&panels, activations, out);
        if rest.rows() > 0 {
            batch_16x4::gemm_eights(&steps::<WORDS>(), &rest, activations, out_rest);
        }
    } else {
        panel::gemm(matrix, activations, out);
    }
}

/// Rows that are multiplied in panels. What is left, if it fills less than three quarters of one, is sooner done without.
fn rows_in_panels(rows: usize) -> usize {
    let rest = rows % panel::ROWS;
    if rest < panel::ROWS / 4 * 3 { rows - rest } else { rows }
}

/// The 8x8 product of a vector.
#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemv_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps::<true>(), matrix, activations, out);
}

/// The 8x8 product of a batch.
#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps::<true>(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_transposed::gemm_transposed_f32(&steps::<true>(), matrix, inputs, out);
}

#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm_dense_add(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]) {
    product_columns::gemm_dense_add(&steps::<true>(), a, x, batch, factor, out);
}

#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
    product_transposed::gemm_transposed_dense_add(&steps::<true>(), a, x, batch, out);
}

#[target_feature(enable = "avx2,f16c,avx512bw,avx512vl,avx512vnni")]
fn gemm_transposed(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]) {
    transposed_16x4::gemm_transposed(&steps::<true>(), matrix, gradients, out);
}
