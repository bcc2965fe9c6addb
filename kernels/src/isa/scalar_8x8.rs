//! The portable 8x8 product.

use super::scalar;
use super::scalar::{Pairs, activation_scale, add_scaled, largest_input, round_to_bits};
use crate::activations::Activations8x8;
use crate::float::Float;
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec::{ACTIVATION_MAX_8X8, CODEBOOK_I8, GROUP_8X8, SPAN, WEIGHT_STEP_8X8};

/// Activations stand in the order of the columns.
pub(super) static SLOTS: &[u8; SPAN] = &scalar::SLOTS;

/// Quantizes inputs in groups, in the order of the columns.
pub(super) fn quantize_activations<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32]) {
    let (groups, _) = inputs.as_chunks::<GROUP_8X8>();
    let (values, padding) = values.as_chunks_mut::<GROUP_8X8>().0.split_at_mut(groups.len());
    padding.iter_mut().for_each(|values| *values = [0; GROUP_8X8]);
    for ((inputs, values), scale) in groups.iter().zip(values).zip(scales) {
        let factor;
        (*scale, factor) = activation_scale(largest_input(inputs), f32::from(ACTIVATION_MAX_8X8));
        *values = [0; GROUP_8X8];
        if factor > 0.0 {
            for (x, value) in inputs.iter().zip(values) {
                #[allow(clippy::cast_possible_truncation, reason = "|x| <= 127, so the low 8 bits hold it")]
                {
                    *value = round_to_bits(x.to_f32() * factor) as i8;
                }
            }
        }
    }
}

/// The 8x8 product.
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot(matrix, row, activations);
    }
}

/// The 8x8 product of a batch.
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(activations.batch()).enumerate() {
        for (n, out) in out.iter_mut().enumerate() {
            *out = dot(matrix, row, &activations.vector(n));
        }
    }
}

/// The 8x8 product of a row and a vector.
fn dot(matrix: &Nf4Matrix<'_>, row: usize, activations: &Activations8x8<'_>) -> f32 {
    let (packed, first_group) = matrix.grouped_row(row);
    let (bytes, _) = packed.as_chunks::<{ GROUP_8X8 / 2 }>();
    let (values, _) = activations.values().as_chunks::<GROUP_8X8>();
    let mut sums = [0.0; 2];
    for (group, ((bytes, values), scale)) in bytes.iter().zip(values).zip(activations.scales()).enumerate() {
        let factor = matrix.absmax_of_group_8x8(first_group + group) * scale;
        let sum = &mut sums[group % 2];
        *sum = add_scaled(*sum, group_sum(bytes, values), factor);
    }
    result(sums)
}

/// The output of a row, from the sums of its even and of its odd groups.
#[inline(always)]
pub(super) fn result([even, odd]: [f32; 2]) -> f32 {
    canonical((even + odd) * WEIGHT_STEP_8X8)
}

/// The exact sum of the products of a group.
#[inline(always)]
fn group_sum(bytes: &[u8; GROUP_8X8 / 2], values: &[i8; GROUP_8X8]) -> i32 {
    let (values, _) = values.as_chunks::<2>();
    let products = bytes.iter().zip(values).map(|(byte, [even, odd])| {
        let [high, low] = PAIRS.0[usize::from(*byte)];
        i32::from(high) * i32::from(*even) + i32::from(low) * i32::from(*odd)
    });
    products.sum()
}

/// As [`scalar::PAIRS`]: the weights of the two columns of each packed byte; 1 KB.
pub(super) static PAIRS: Pairs = Pairs({
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        // Not `i16::from`, which is no `const fn`.
        pairs[byte] = [CODEBOOK_I8[byte >> 4] as i16, CODEBOOK_I8[byte & 15] as i16];
        byte += 1;
    }
    pairs
});
