//! The 8x8 product on Arm cores with the DSP extension.
//!
//! ```text
//! for each two bytes (four weights) of a group:
//!     low, high = sxtb16(q), sxtb16(q, ror 8)   q: one load of four activations for all rows
//!     sum = smlad(PAIRS[byte[0]], low, sum)     two 16-bit weights: the high nibble's below, the low nibble's above
//!     sum = smlad(PAIRS[byte[1]], high, sum)
//! sums[group % 2] += f32(sum) * (absmax * scale)
//! ```
//!
//! `sxtb16` extends the bytes 0 and 2 of a word, so of each four activations the second and the third have changed places.

use super::instructions::{join, smlad_twice, sxtb16, sxtb16_ror_8};
use crate::activations::Activations8x8;
use crate::float::Float;
use crate::isa::scalar::activations::quantize_activations_8x8;
use crate::isa::scalar::product_8x8::{PAIRS, result};
use crate::isa::scalar::product_16x4::add_scaled;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Rows that share the loads of activations.
const ROWS: usize = 2;

/// The packed bytes of a span.
type Packed = [u8; SPAN / 2];

/// Of each four columns the second and the third have changed places.
pub(super) static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a slot is below 64")]
        {
            slots[column] = (column / 4 * 4 + [0, 2, 1, 3][column % 4]) as u8;
        }
        column += 1;
    }
    slots
};

/// Quantizes inputs in groups, into the order of [`SLOTS`].
pub(super) fn quantize_activations<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32]) {
    quantize_activations_8x8(inputs, values, scales);
    values.as_chunks_mut::<4>().0.iter_mut().for_each(|four| four.swap(1, 2));
}

/// The 8x8 product of a batch.
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    let batch = activations.batch();
    for n in 0..batch {
        let vector = activations.vector(n);
        for (i, out) in out.chunks_mut(ROWS * batch).enumerate() {
            // Where there is only one row left, it is taken twice.
            let last = out.len() / batch - 1;
            let products = dots(matrix, [0, 1].map(|r: usize| i * ROWS + r.min(last)), &vector);
            for (out, product) in out.chunks_exact_mut(batch).zip(products) {
                out[n] = product;
            }
        }
    }
}

/// The 8x8 products of two rows with a vector.
fn dots(matrix: &Nf4Matrix<'_>, rows: [usize; ROWS], activations: &Activations8x8<'_>) -> [f32; ROWS] {
    let [(above, above_group), (below, below_group)] = rows.map(|row| matrix.grouped_row(row));
    let ((above, above_rest), (below, below_rest)) = (above.as_chunks(), below.as_chunks());
    let (values, (scales, half)) = (activations.values().as_chunks().0, activations.scales().as_chunks::<2>());
    let [mut even, mut odd] = [[0.0; ROWS]; 2];
    let mut group = 0;
    for (((above, below), values), scales) in above.iter().zip(below).zip(values).zip(scales) {
        let factors = |group: usize, scale| {
            [above_group + group, below_group + group].map(|group| matrix.absmax_of_group_8x8(group) * scale)
        };
        add_scaled_sums(&mut even, group_sums::<0>([above, below], values), factors(group, scales[0]));
        add_scaled_sums(&mut odd, group_sums::<1>([above, below], values), factors(group + 1, scales[1]));
        group += 2;
    }
    if let (Some(values), &[scale]) = (values.last(), half) {
        let factors = [above_group + group, below_group + group].map(|group| matrix.absmax_of_group_8x8(group) * scale);
        let bytes = [above_rest, below_rest].map(|rest| {
            let mut bytes = [0; SPAN / 2];
            bytes.iter_mut().zip(rest).for_each(|(byte, rest)| *byte = *rest);
            bytes
        });
        add_scaled_sums(&mut even, group_sums::<0>(bytes.each_ref(), values), factors);
    }
    [0, 1].map(|r: usize| result([even[r % ROWS], odd[r % ROWS]]))
}

/// Adds the exact sums of a group to those of two rows.
#[inline(always)]
fn add_scaled_sums(sums: &mut [f32; ROWS], products: [i32; ROWS], factors: [f32; ROWS]) {
    for ((sum, products), factor) in sums.iter_mut().zip(products).zip(factors) {
        *sum = add_scaled(*sum, products, factor);
    }
}

/// The exact sums of the products of the first or the second group of a span of two rows.
#[inline(always)]
fn group_sums<const GROUP: usize>(bytes: [&Packed; ROWS], values: &[i8; SPAN]) -> [i32; ROWS] {
    let mut sums = [0; ROWS];
    for i in 0..8 {
        let four = 8 * GROUP + i;
        let q = u32::from_le_bytes(values.as_chunks::<4>().0[four].map(i8::cast_unsigned));
        let q = [sxtb16(q), sxtb16_ror_8(q)];
        for (sum, bytes) in sums.iter_mut().zip(bytes) {
            *sum = smlad_twice([0, 1].map(|i| weights(bytes, 2 * four + i)), q, *sum);
        }
    }
    sums
}

/// The two weights of a byte of a span.
#[inline(always)]
fn weights(bytes: &Packed, i: usize) -> u32 {
    join(PAIRS.0[usize::from(bytes[i % bytes.len()])])
}
