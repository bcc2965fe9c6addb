//! The 8x8 product in portable code.

use super::product_16x4::{Pairs, add_scaled};
use crate::activations::Activations8x8;
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec::{CODEBOOK_I8, GROUP_8X8, WEIGHT_STEP_8X8};

/// The 8x8 product.
pub(in crate::isa) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot(matrix, row, activations);
    }
}

/// The 8x8 product of a batch.
pub(in crate::isa) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
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
pub(in crate::isa) fn result([even, odd]: [f32; 2]) -> f32 {
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

/// As [`product_16x4::PAIRS`](super::product_16x4::PAIRS): the weights of the two columns of each packed byte; 1 KB.
pub(in crate::isa) static PAIRS: Pairs = Pairs({
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        // Not `i16::from`, which is no `const fn`.
        pairs[byte] = [CODEBOOK_I8[byte >> 4] as i16, CODEBOOK_I8[byte & 15] as i16];
        byte += 1;
    }
    pairs
});
