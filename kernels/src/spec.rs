// The first definition of a link counts: these are for rustdoc, those in the file for the web.
//! [`CODEBOOK`]: crate::CODEBOOK
//! [`CODEBOOK_I16`]: CODEBOOK_I16
//! [`CODEBOOK_I8`]: CODEBOOK_I8
//! [`F32_SLOTS`]: F32_SLOTS
//! [`Kernels::gemm`]: crate::Kernels::gemm
//! [`Kernels::gemm_8x8`]: crate::Kernels::gemm_8x8
//! [`Kernels::gemm_dense`]: crate::Kernels::gemm_dense
//! [`Kernels::gemm_dense_add`]: crate::Kernels::gemm_dense_add
//! [`Kernels::gemm_f32`]: crate::Kernels::gemm_f32
//! [`Kernels::gemm_transposed`]: crate::Kernels::gemm_transposed
//! [`Kernels::gemm_transposed_f32`]: crate::Kernels::gemm_transposed_f32
//! [`PANEL`]: PANEL
//! [`ROW_CHUNK`]: ROW_CHUNK
//! [`ROW_GROUP`]: ROW_GROUP
//! [`WEIGHT_STEP`]: WEIGHT_STEP
//! [`WEIGHT_STEP_8X8`]: WEIGHT_STEP_8X8
//! [`add_lanes`]: add_lanes
//! [`add_places`]: add_places
//!
#![doc = include_str!("../SPEC.md")]

use crate::format::CODEBOOK;

/// The 16x4 codebook: `round(CODEBOOK[k] * 32767)`.
pub const CODEBOOK_I16: [i16; 16] = {
    let mut book = [0; 16];
    let mut k = 0;
    while k < 16 {
        let x = CODEBOOK[k] as f64 * 32767.0;
        #[allow(clippy::cast_possible_truncation, reason = "|x| <= 32767, and truncation after adding a half rounds")]
        {
            book[k] = (if x < 0.0 { x - 0.5 } else { x + 0.5 }) as i16;
        }
        k += 1;
    }
    book
};

/// The weight of a step of [`CODEBOOK_I16`]: `1 / 32767`, rounded to f32.
pub const WEIGHT_STEP: f32 = 1.0 / 32767.0;

/// The 8x8 codebook: `round(CODEBOOK[k] * 124.11)`.
///
/// Of all factors from 100 to 127 this one has the least error on normal weights in blocks of 64, 0.48 % of their root
/// mean square (127: 0.61 %); `tests/codebook.rs` derives it.
pub const CODEBOOK_I8: [i8; 16] = [-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124];

/// The weight of a step of [`CODEBOOK_I8`]: `1 / 124.11`, rounded to f32.
pub const WEIGHT_STEP_8X8: f32 = 1.0 / 124.11;

/// The largest quantized activation of the 16x4 product: 14 bits with sign, so that eight products with a 16-bit weight
/// fit in an `i32`.
pub const ACTIVATION_MAX: i16 = 8191;

/// The largest quantized activation of the 8x8 product. `-128` is never used, so the negative of a value is one too.
pub const ACTIVATION_MAX_8X8: i8 = 127;

const _: () = assert!(8 * 32767 * (ACTIVATION_MAX as i64) <= i32::MAX as i64, "a lane's sum of a span is exact");

/// Columns of a group of the 8x8 product, which share a scale and whose products have one exact sum.
pub const GROUP_8X8: usize = 32;

/// The sum of the eight lanes of a row, in the order that every product uses.
#[inline(always)]
#[must_use]
pub fn add_lanes(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// The columns of a span, by which every product proceeds along a row.
pub const SPAN: usize = 64;

/// Half of a span: what a block has at least, and a step of the transposed products.
pub(crate) const HALF_SPAN: usize = SPAN / 2;

/// The columns of a panel of the f32 product. Its inputs are arranged in the order of decoding once for all rows, on the
/// stack.
pub const PANEL: usize = 4096;

/// The rows that the transposed f32 product sums before it adds the sum to its output.
pub const ROW_CHUNK: usize = 512;

/// The rows of a group of the transposed 16x4 product, which share a scale and whose products have one exact sum.
pub const ROW_GROUP: usize = 32;

const _: () = assert!(
    ROW_GROUP as i64 * (ACTIVATION_MAX as i64).pow(2) <= i32::MAX as i64 && ROW_CHUNK.is_multiple_of(ROW_GROUP),
    "the sum of a group of rows is exact, and a chunk has whole groups"
);

/// The lane of each column of a span in the f32 product, and its place in the lane, as `place * 8 + lane`.
///
/// The even columns come first, then the odd ones; the first 32 columns go to lanes 0-3, the others to lanes 4-7.
pub const F32_SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        let (byte, odd) = (column / 2, column % 2);
        let (place, lane) = (odd * 4 + byte % 16 / 4, byte / 16 * 4 + byte % 4);
        #[allow(clippy::cast_possible_truncation, reason = "place and lane are below 8")]
        {
            slots[column] = (place * 8 + lane) as u8;
        }
        column += 1;
    }
    slots
};

/// The lane sums of the f32 product: eight places of eight lanes, summed as a tree.
#[inline(always)]
#[must_use]
pub fn add_places(products: &[f32; SPAN]) -> [f32; 8] {
    let p = products.as_chunks::<8>().0;
    core::array::from_fn(|l| ((p[0][l] + p[1][l]) + (p[2][l] + p[3][l])) + ((p[4][l] + p[5][l]) + (p[6][l] + p[7][l])))
}
