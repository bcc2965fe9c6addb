//! x86-64 with AVX-512 and its VNNI: the 16x4 products, and the f32 products of batches. All else is that of AVX2, with
//! its order of activations.
//!
//! `vpermw` looks 16-bit weights up by codes whose upper bits it ignores, and `vpdpwssd` adds the two products of each
//! 32-bit lane to a sum. A few vectors take two rows to a register (`few.rs`). The step for their spans of 32 packed
//! bytes, where the lower half of each register belongs to the first row:
//!
//! ```text
//! low, high = unpack(bytes, bytes)          16-bit words b0 b0, b1 b1, .. b7 b7 and b8 b8, .. b15 b15 of 128 bits
//! w0, w1 = BOOK[low >> 4], BOOK[high >> 4]  vpermw: even columns
//! w2, w3 = BOOK[low], BOOK[high]            odd columns
//! sums = w0 q0 + w1 q1 + w2 q2 + w3 q3      q is in both halves of a register
//! lanes += f32(sums) * factors
//! ```
//!
//! ```text
//!                   row 0                                    row 1
//! w0   0 2| 4 6| 8 10|12 14|32 34|36 38|40 42|44 46    0 2| 4 6| ..
//! w1  16 18|20 22|24 26|28 30|48 50|52 54|56 58|60 62  16 18|20 22| ..
//! lane  0    1     2     3     4     5     6     7       0     1
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
mod few;
mod panel;
mod panel_f32;
mod registers;
mod steps_8x8;
mod steps_transposed;

use core::arch::x86_64::{__m512i, _mm512_broadcast_i32x4};

use bytemuck::must_cast;

use super::avx2;
use super::simd::planes::UNSIGNED_BOOK_I8;
use super::simd::steps::Steps;
use super::simd::{batch_8x8, product_8x8};
use super::table::{FloatTable, Isa, Table};
use crate::activations::{Activations, Activations8x8};
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

pub(super) static TABLE: Table = Table {
    isa: Isa::Avx512Vnni,
    gemv: multiply,
    gemm: multiply,
    gemv_8x8,
    gemm_8x8,
    f32: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.f32 },
    f16: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.f16 },
    bf16: FloatTable { gemm_f32: panel_f32::gemm_f32, ..avx2::TABLE.bf16 },
    gemm_transposed_f32: columns::gemm_transposed_f32,
    gemm_transposed: columns::gemm_transposed,
    gemm_transposed_dense_add: columns::gemm_transposed_dense_add,
    ..avx2::TABLE
};

/// A table for look-ups: the 8x8 codebook, larger by 128, in each 128 bits.
struct Avx512 {
    i8_book: __m512i,
}

#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn steps() -> Steps<Avx512> {
    let i8_book = _mm512_broadcast_i32x4(must_cast(UNSIGNED_BOOK_I8));
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(Avx512 { i8_book }) }
}

/// The 8x8 product of a vector.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn gemv_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps(), matrix, activations, out);
}

/// The 8x8 product of a batch.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn gemm_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps(), matrix, activations, out);
}

/// From this batch on, decoding into a panel is faster.
const PANEL_BATCH: usize = 12;

/// The 16x4 products of a row-aligned matrix and a batch.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn multiply(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if matrix.cols() == 0 {
        out.fill(0.0);
    } else if activations.batch() < PANEL_BATCH && !few::is_worthwhile(matrix) {
        avx2::gemm(matrix, activations, out);
    } else if activations.group() == SPAN {
        multiply_groups::<1>(matrix, activations, out);
    } else {
        multiply_groups::<2>(matrix, activations, out);
    }
}

/// Whole panels of rows for a batch, and what is left in fours.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn multiply_groups<const GROUPS: usize>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let batch = activations.batch();
    let rows = if batch < PANEL_BATCH { 0 } else { matrix.rows() / panel::ROWS * panel::ROWS };
    let (panels, rest) = out.split_at_mut(rows * batch);
    if !panels.is_empty() {
        panel::multiply::<GROUPS>(matrix, activations, panels);
    }
    few::multiply::<GROUPS>(matrix, activations, rows, rest);
}
