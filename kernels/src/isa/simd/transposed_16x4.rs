//! The loops of the transposed 16x4 product.
//!
//! ```text
//! for 64 columns:
//!     for 512 rows:                                         a chunk
//!         panel = decode(512 rows, 64 columns)              once for all vectors
//!         for 64 vectors:
//!             sums[64][64] = 0
//!             for 128 rows of 32 columns:                   in the nearest cache
//!                 for 4 vectors, for some registers of columns:
//!                     totals = sums                         in registers, like all below
//!                     for 32 rows:                          a group
//!                         products = 0                      exact
//!                         for 2 rows:
//!                             w = panel
//!                             for each vector: products += w[0] q[0] + w[1] q[1]
//!                         totals += f32(products) * (scale * scale of the vector)
//!                     sums = totals
//!             out += sums
//! ```

use core::ops::Range;

use super::steps::Steps;
use super::steps_transposed_16x4::{IntegerColumns, Near, RowPair};
use crate::format::canonical;
use crate::gradients::Gradients;
use crate::isa::scalar::transposed_16x4::weight_scale;
use crate::matrix::Nf4Matrix;
use crate::spec::{HALF_SPAN, ROW_CHUNK, ROW_GROUP, SPAN};

/// Groups of rows of a panel: 64 KB of decoded weights.
const GROUPS: usize = ROW_CHUNK / ROW_GROUP;

/// The weights of a chunk of rows in the two halves of a span.
#[repr(align(64))]
pub(in crate::isa) struct Panel {
    weights: [[[RowPair; ROW_GROUP / 2]; GROUPS]; 2],
    scales: [[f32; GROUPS]; 2],
}

/// Groups of rows that all vectors of a tile meet in turn: 8 KB of the weights of half a span.
const NEAR: usize = 4;
/// Vectors whose sums are held at once: 16 KB.
const VECTORS: usize = 64;

/// The product with the transpose of a matrix whose rows are whole groups of columns; nothing is empty.
#[inline(always)]
pub(in crate::isa) fn gemm_transposed<S: IntegerColumns>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    gradients: &Gradients<'_>,
    out: &mut [f32],
) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let weights = [[[[0; 2 * HALF_SPAN]; ROW_GROUP / 2]; GROUPS]; 2];
    let mut panel = Panel { weights, scales: [[0.0; GROUPS]; 2] };
    let mut sums = [[0.0; SPAN]; VECTORS];
    out.fill(0.0);
    for column in (0..cols).step_by(SPAN) {
        let columns = column..cols.min(column + SPAN);
        for chunk in (0..rows).step_by(ROW_CHUNK) {
            let chunk = chunk..rows.min(chunk + ROW_CHUNK);
            fill(steps, &mut panel, matrix, chunk.clone(), columns.clone());
            for (tile, out) in out.chunks_mut(cols.saturating_mul(VECTORS)).enumerate() {
                let sums = &mut sums[..out.len() / cols];
                sums.fill([0.0; SPAN]);
                for half in 0..columns.len() / HALF_SPAN {
                    let groups = chunk.start / ROW_GROUP..chunk.end.div_ceil(ROW_GROUP);
                    let near = panel.weights[half].chunks(NEAR).zip(panel.scales[half].chunks(NEAR));
                    for (start, (weights, scales)) in groups.clone().step_by(NEAR).zip(near) {
                        let groups = start..groups.end.min(start + NEAR);
                        let near = Near { weights, scales, groups, half };
                        add_tile(steps, &near, gradients, tile * VECTORS, sums);
                    }
                }
                for (sums, out) in sums.iter().zip(out.chunks_exact_mut(cols)) {
                    for (out, sum) in out[columns.clone()].iter_mut().zip(sums) {
                        *out = canonical(*out + sum);
                    }
                }
            }
        }
    }
}

/// Adds the products of some groups and the vectors of a tile, from `first` on, to their sums.
#[inline(always)]
fn add_tile<S: IntegerColumns>(
    steps: &Steps<S>,
    near: &Near<'_>,
    gradients: &Gradients<'_>,
    first: usize,
    sums: &mut [[f32; SPAN]],
) {
    let (fours, rest) = sums.as_chunks_mut::<4>();
    let (twos, ones) = rest.as_chunks_mut::<2>();
    let mut vector = first;
    for sums in fours {
        steps.add_vectors(near, gradients, vector, sums);
        vector += 4;
    }
    for sums in twos {
        steps.add_vectors(near, gradients, vector, sums);
        vector += 2;
    }
    for sums in ones {
        steps.add_vectors(near, gradients, vector, core::array::from_mut(sums));
    }
}

/// Puts a chunk of rows and the columns of a span in a panel. Where there is no row, what an earlier panel left stays: it
/// meets values of 0.
#[inline(always)]
fn fill<S: IntegerColumns>(
    steps: &Steps<S>,
    panel: &mut Panel,
    matrix: &Nf4Matrix<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    let (first, halves) = (columns.start / HALF_SPAN, columns.len() / HALF_SPAN);
    // Then both halves of every row have one absmax.
    let one_block = matrix.cols().is_multiple_of(SPAN) && matrix.block_size().get() >= SPAN;
    for (group, start) in rows.clone().step_by(ROW_GROUP).enumerate() {
        let rows = start..rows.end.min(start + ROW_GROUP);
        let (scale, factors) = weight_scale(matrix, rows.clone(), first);
        let mut of_halves = [(scale, factors); 2];
        if halves == 2 && !one_block {
            of_halves[1] = weight_scale(matrix, rows.clone(), first + 1);
        }
        for (half, (scale, _)) in of_halves.iter().enumerate() {
            panel.scales[half][group] = *scale;
        }
        for (pair, row) in rows.clone().step_by(2).enumerate() {
            let packed = |row| matrix.grouped_row(row).0[columns.start / 2..].as_chunks().0;
            let (first, second) = (packed(row), packed((row + 1).min(rows.end - 1)));
            let factors = |half: usize| of_halves[half].1.as_chunks::<2>().0[pair];
            let mut books = steps.books(factors(0));
            for half in 0..halves {
                if half == 1 && !one_block {
                    books = steps.books(factors(1));
                }
                let out = &mut panel.weights[half][group][pair];
                steps.decode_pair(&books, [&first[half], &second[half]], out);
            }
        }
    }
}

/// Adds the products of some groups and the `N` vectors from `first` on to their sums, `C` registers of columns at a time.
#[inline(always)]
pub(in crate::isa) fn add_vectors<S: IntegerColumns, const N: usize, const C: usize>(
    steps: &Steps<S>,
    near: &Near<'_>,
    gradients: &Gradients<'_>,
    first: usize,
    sums: &mut [[f32; SPAN]; N],
) {
    for part in 0..HALF_SPAN / S::COLUMNS / C {
        let register = |c| near.half * (HALF_SPAN / S::COLUMNS) + part * C + c;
        let mut totals = [[steps.splat_columns(0.0); C]; N];
        for (totals, sums) in totals.iter_mut().zip(&*sums) {
            for (c, total) in totals.iter_mut().enumerate() {
                *total = steps.load_columns(sums, register(c));
            }
        }
        for (group, (weights, scale)) in near.groups.clone().zip(near.weights.iter().zip(near.scales)) {
            let (values, scales) = gradients.group::<N>(group, first);
            let mut products = [[steps.no_sums(); C]; N];
            for (four, weights) in weights.as_chunks::<4>().0.iter().enumerate() {
                for (pair, weights) in weights.iter().enumerate() {
                    let mut x = [steps.splat_pair(&[0; 2]); N];
                    for (x, values) in x.iter_mut().zip(values) {
                        *x = steps.splat_pair(&values.as_chunks().0[four * 4 + pair]);
                    }
                    for (products, x) in products.iter_mut().zip(x) {
                        for (c, products) in products.iter_mut().enumerate() {
                            let w = steps.load_weights(weights, part * C + c);
                            *products = steps.add_pair_products(*products, w, x);
                        }
                    }
                }
            }
            for ((totals, products), of_vector) in totals.iter_mut().zip(products).zip(scales) {
                let factor = steps.splat_columns(scale * of_vector);
                for (total, products) in totals.iter_mut().zip(products) {
                    *total = steps.add_columns(*total, steps.mul_columns(steps.sums_to_f32(products), factor));
                }
            }
        }
        for (sums, totals) in sums.iter_mut().zip(totals) {
            for (c, total) in totals.into_iter().enumerate() {
                steps.store_columns(sums, register(c), total);
            }
        }
    }
}
