//! Portable code of the transposed 16x4 product, and what all instruction sets share of it.

use core::ops::Range;

use super::activations::{activation_scale, largest_input, round_to_bits};
use super::product_16x4::add_scaled;
use crate::format::{CODEBOOK, canonical};
use crate::gradients::Gradients;
use crate::matrix::Nf4Matrix;
use crate::spec::{ACTIVATION_MAX, HALF_SPAN, ROW_CHUNK, ROW_GROUP};

/// Quantizes vectors, `[batch, rows]`, in groups, and puts them into the order of [`Gradients`].
#[inline(always)]
pub(in crate::isa) fn quantize_gradients(inputs: &[f32], rows: usize, values: &mut [i16], scales: &mut [f32]) {
    let batch = inputs.len() / rows;
    for (v, inputs) in inputs.chunks_exact(rows).enumerate() {
        let values = values.as_chunks_mut().0.iter_mut().skip(v).step_by(batch);
        let mut groups = values.zip(scales.iter_mut().skip(v).step_by(batch));
        let (whole, rest) = inputs.as_chunks();
        for (inputs, (values, scale)) in whole.iter().zip(&mut groups) {
            *scale = quantize_group(inputs, values);
        }
        if let Some((values, scale)) = groups.next() {
            let mut padded = [0.0; ROW_GROUP];
            padded[..rest.len()].copy_from_slice(rest);
            *scale = quantize_group(&padded, values);
        }
    }
}

/// Quantizes a group, and returns its scale.
#[inline(always)]
fn quantize_group(inputs: &[f32; ROW_GROUP], values: &mut [i16; ROW_GROUP]) -> f32 {
    let (scale, factor) = activation_scale(largest_input(inputs), f32::from(ACTIVATION_MAX));
    *values = if factor > 0.0 { inputs.map(|x| round(x * factor)) } else { [0; ROW_GROUP] };
    scale
}

/// The nearest integer, ties to even, of a number up to [`ACTIVATION_MAX`].
#[inline(always)]
fn round(x: f32) -> i16 {
    #[allow(clippy::cast_possible_truncation, reason = "|x| <= 8191, so the low 16 bits hold it")]
    {
        round_to_bits(x) as i16
    }
}

/// The scale of the weights of a group of rows in some columns that lie in one block of each row, and what [`CODEBOOK`] is
/// multiplied by to give the weights of each row; 0 for rows that are not there. `rows` is not longer than a group, and the
/// columns are a half of a span.
#[inline(always)]
pub(in crate::isa) fn weight_scale(matrix: &Nf4Matrix<'_>, rows: Range<usize>, half: usize) -> (f32, [f32; ROW_GROUP]) {
    let mut factors = [0.0; ROW_GROUP];
    for (absmax, row) in factors.iter_mut().zip(rows) {
        *absmax = matrix.absmax_of_group_8x8(matrix.grouped_row(row).1 + half);
    }
    let (scale, factor) = activation_scale(largest_input(&factors), f32::from(ACTIVATION_MAX));
    for absmax in &mut factors {
        // An absmax that is not finite has no product with 0.
        *absmax = if factor > 0.0 { *absmax * factor } else { 0.0 };
    }
    (scale, factors)
}

/// Vectors that share decoded weights.
const VECTORS: usize = 8;

/// The product with the transpose of a matrix whose rows are whole groups of columns.
pub(in crate::isa) fn gemm_transposed(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    out.fill(0.0);
    for half in 0..cols / HALF_SPAN {
        for (tile, out) in out.chunks_mut(cols.saturating_mul(VECTORS)).enumerate() {
            for chunk in (0..rows).step_by(ROW_CHUNK) {
                let mut sums = [[0.0; HALF_SPAN]; VECTORS];
                for row in (chunk..rows.min(chunk + ROW_CHUNK)).step_by(ROW_GROUP) {
                    let (weights, scale) = decode(matrix, row, half);
                    for (vector, sums) in (tile * VECTORS..gradients.batch()).zip(&mut sums) {
                        let ([values], [of_vector]) = gradients.group(row / ROW_GROUP, vector);
                        add_group(sums, &weights, values, scale * of_vector);
                    }
                }
                for (out, sums) in out.chunks_exact_mut(cols).zip(&sums) {
                    for (out, sum) in out[half * HALF_SPAN..].iter_mut().zip(sums) {
                        *out = canonical(*out + sum);
                    }
                }
            }
        }
    }
}

/// The weights of a group of rows from `first` on and of a half of a span, and their scale.
fn decode(matrix: &Nf4Matrix<'_>, first: usize, half: usize) -> ([[i16; HALF_SPAN]; ROW_GROUP], f32) {
    let rows = first..matrix.rows().min(first + ROW_GROUP);
    let (scale, factors) = weight_scale(matrix, rows.clone(), half);
    let mut weights = [[0; HALF_SPAN]; ROW_GROUP];
    for ((weights, row), factor) in weights.iter_mut().zip(rows).zip(factors) {
        let book = CODEBOOK.map(|c| round(c * factor));
        let packed = &matrix.grouped_row(row).0[half * HALF_SPAN / 2..];
        for (pair, byte) in weights.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
            *pair = [book[usize::from(byte >> 4)], book[usize::from(byte & 15)]];
        }
    }
    (weights, scale)
}

/// Adds the products of a group of rows and a vector to sums of columns.
fn add_group(
    sums: &mut [f32; HALF_SPAN],
    weights: &[[i16; HALF_SPAN]; ROW_GROUP],
    values: &[i16; ROW_GROUP],
    factor: f32,
) {
    let mut products = [0; HALF_SPAN];
    for (weights, value) in weights.iter().zip(values) {
        for (product, weight) in products.iter_mut().zip(weights) {
            *product += i32::from(*weight) * i32::from(*value);
        }
    }
    for (sum, product) in sums.iter_mut().zip(products) {
        *sum = add_scaled(*sum, product, factor);
    }
}
