//! Arm cores with the DSP extension: Cortex-M4, M7, and M33 and newer where it was built in.
//!
//! The step of the 16x4 product, for the four bytes (eight weights) of a span that belong to one lane:
//!
//! ```text
//! for i in the four bytes of the lane:
//!     w = PAIRS[byte[i]]                    two 16-bit weights: the high nibble's below, the low nibble's above
//!     q = values[2 i], values[2 i + 1]      two 16-bit activations, one load for all rows
//!     sum = smlad(w, q, sum)                sum + w.low * q.low + w.high * q.high
//! lanes[lane] += f32(sum) * (absmax * scale)
//! ```
//!
//! ```text
//! bytes of lane    0          1          2            3            4            5            6            7
//!               0 1 8 9   2 3 10 11   4 5 12 13   6 7 14 15   16 17 24 25  18 19 26 27  20 21 28 29  22 23 30 31
//! ```
//!
//! Both columns of a byte are in one lane, so with activations in the order of the columns a product of pairs adds to
//! one lane only. Two rows share the loads of activations; more would not leave enough registers. The last step
//! is a `vmla`, which rounds the product and then the sum, as the definition wants (`vfma` would be the fused one).
//!
//! `product_8x8.rs` has the 8x8 product. Only the products of integers are faster than portable code this way: all else is
//! f32 arithmetic, one number at a time on these cores, and is that of `scalar.rs`.

mod instructions;
mod product_8x8;

use instructions::{join, smlad, smuad};

use super::scalar;
use super::scalar::product_16x4::{PAIRS, add_half_span, add_scaled, pair};
use super::table::{FloatTable, Isa, Table};
use crate::activations::Activations;
use crate::format::{canonical, get_or};
use crate::matrix::Nf4Matrix;
use crate::spec::{self, SPAN};

pub(super) static TABLE: Table = Table {
    isa: Isa::CortexMDsp,
    gemv,
    gemm,
    slots_8x8: &product_8x8::SLOTS,
    f32: FloatTable { quantize_activations_8x8: product_8x8::quantize_activations, ..scalar::TABLE.f32 },
    f16: FloatTable { quantize_activations_8x8: product_8x8::quantize_activations, ..scalar::TABLE.f16 },
    bf16: FloatTable { quantize_activations_8x8: product_8x8::quantize_activations, ..scalar::TABLE.bf16 },
    gemv_8x8: product_8x8::gemm,
    gemm_8x8: product_8x8::gemm,
    ..scalar::TABLE
};

/// Rows that share the loads of activations.
const ROWS: usize = 2;

/// The 16x4 product.
fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    for (i, out) in out.chunks_mut(ROWS).enumerate() {
        for (out, product) in out.iter_mut().zip(dots(matrix, i * ROWS, activations)) {
            *out = product;
        }
    }
}

/// The 16x4 product of a batch.
fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let batch = activations.batch();
    for n in 0..batch {
        let vector = activations.vector(n);
        for (i, out) in out.chunks_mut(ROWS * batch).enumerate() {
            for (out, product) in out.chunks_exact_mut(batch).zip(dots(matrix, i * ROWS, &vector)) {
                out[n] = product;
            }
        }
    }
}

/// The 16x4 products of consecutive rows with a vector. Where the matrix has fewer rows left, its last one is taken again,
/// because that costs less flash than code for a single row.
fn dots(matrix: &Nf4Matrix<'_>, first_row: usize, activations: &Activations<'_>) -> [f32; ROWS] {
    let last_row = matrix.rows() - 1;
    let rows: [_; ROWS] = core::array::from_fn(|r| matrix.aligned_row((first_row + r).min(last_row)));
    let first_blocks = rows.map(|(_, first_block)| first_block);
    let mut lanes = [[0.0; ROWS]; 8];
    let mut spans = rows.map(|(packed, _)| packed.as_chunks::<{ SPAN / 2 }>().0.iter());
    let mut group = 0;
    let (values, rest) = split_last_span(activations.values(), matrix.cols());
    for values in values {
        let mut bytes = [&[0; SPAN / 2]; ROWS];
        for (bytes, spans) in bytes.iter_mut().zip(&mut spans) {
            *bytes = spans.next().unwrap_or(bytes);
        }
        let first = group_factors(matrix, first_blocks, activations, group);
        let second = if activations.group() == SPAN {
            first
        } else {
            group += 1;
            group_factors(matrix, first_blocks, activations, group)
        };
        group += 1;
        // Written out, because the positions of a lane's bytes must be constants in the loads.
        add_lane::<0>(&mut lanes, bytes, values, first);
        add_lane::<1>(&mut lanes, bytes, values, first);
        add_lane::<2>(&mut lanes, bytes, values, first);
        add_lane::<3>(&mut lanes, bytes, values, first);
        add_lane::<4>(&mut lanes, bytes, values, second);
        add_lane::<5>(&mut lanes, bytes, values, second);
        add_lane::<6>(&mut lanes, bytes, values, second);
        add_lane::<7>(&mut lanes, bytes, values, second);
    }
    let mut lanes: [[f32; 8]; ROWS] = core::array::from_fn(|r| lanes.map(|lane| lane[r]));
    if let Some(values) = rest {
        let factors = group_factors(matrix, first_blocks, activations, group);
        for (lanes, ((packed, _), factor)) in lanes.iter_mut().zip(rows.into_iter().zip(factors)) {
            add_half_span(lanes, packed.as_chunks::<{ SPAN / 2 }>().1, values, factor);
        }
    }
    lanes.map(|lanes| canonical(spec::add_lanes(lanes) * spec::WEIGHT_STEP))
}

/// The product of absmax and activation scale of a group, for each row.
#[inline(always)]
fn group_factors(
    matrix: &Nf4Matrix<'_>,
    first_blocks: [usize; ROWS],
    activations: &Activations<'_>,
    group: usize,
) -> [f32; ROWS] {
    let scale = get_or(activations.scales(), group, 0.0);
    let mut factors = [0.0; ROWS];
    for (factor, first_block) in factors.iter_mut().zip(first_blocks) {
        *factor = matrix.absmax_of_group(first_block, group) * scale;
    }
    factors
}

/// The whole spans, and the last one if a row has only half of it.
#[inline(always)]
fn split_last_span(values: &[i16], cols: usize) -> (&[[i16; SPAN]], Option<&[i16; SPAN]>) {
    match values.as_chunks::<SPAN>().0 {
        [whole @ .., last] if !cols.is_multiple_of(SPAN) => (whole, Some(last)),
        whole => (whole, None),
    }
}

/// Adds the sums of a lane of a span, for each row.
#[inline(always)]
fn add_lane<const LANE: usize>(
    lanes: &mut [[f32; ROWS]; 8],
    bytes: [&[u8; SPAN / 2]; ROWS],
    values: &[i16; SPAN],
    factors: [f32; ROWS],
) {
    let sums = lane_sums(LANE, bytes, values);
    for (lane, (sum, factor)) in lanes[LANE].iter_mut().zip(sums.into_iter().zip(factors)) {
        *lane = add_scaled(*lane, sum, factor);
    }
}

/// The exact sum of a lane of a span, for each row.
#[inline(always)]
fn lane_sums(lane: usize, bytes: [&[u8; SPAN / 2]; ROWS], values: &[i16; SPAN]) -> [i32; ROWS] {
    let first = lane / 4 * 16 + lane % 4 * 2;
    let mut sums = [0; ROWS];
    let q = join(pair(values, first));
    for (sum, bytes) in sums.iter_mut().zip(bytes) {
        *sum = smuad(weights(bytes, first), q);
    }
    for i in [first + 1, first + 8, first + 9] {
        let q = join(pair(values, i));
        for (sum, bytes) in sums.iter_mut().zip(bytes) {
            *sum = smlad(weights(bytes, i), q, *sum);
        }
    }
    sums
}

/// The two weights of a byte of a span.
#[inline(always)]
fn weights(bytes: &[u8; SPAN / 2], i: usize) -> u32 {
    join(PAIRS.0[usize::from(bytes[i % bytes.len()])])
}
