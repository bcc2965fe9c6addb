//! The products with a transposed matrix in portable code.

use crate::format::{CODEBOOK, canonical};
use crate::matrix::Nf4Matrix;
use crate::spec::{self, SPAN};

/// The f32 product with the transpose of a matrix of any shape.
pub(in crate::isa) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (chunk, inputs) in inputs.chunks(spec::ROW_CHUNK).enumerate() {
        for (s, out) in out.chunks_mut(SPAN).enumerate() {
            let mut sums = [0.0; SPAN];
            for (four, inputs) in inputs.chunks(4).enumerate() {
                let mut products = [[0.0; SPAN]; 4];
                for (i, (x, products)) in inputs.iter().zip(&mut products).enumerate() {
                    let start = matrix.row_start(chunk * spec::ROW_CHUNK + four * 4 + i) + s * SPAN;
                    for segment in matrix.segments(start, start + out.len()) {
                        let factor = segment.absmax * x;
                        let products = &mut products[segment.start - start..][..segment.len];
                        for (j, product) in products.iter_mut().enumerate() {
                            *product = CODEBOOK[matrix.code(segment.start + j)] * factor;
                        }
                    }
                }
                add_fours(&mut sums, &products);
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out += sum;
            }
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// The f32 product of a batch with the transpose of a matrix of any shape.
pub(in crate::isa) fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    for (inputs, out) in inputs.chunks_exact(matrix.rows()).zip(out.chunks_exact_mut(matrix.cols())) {
        gemv_transposed_f32(matrix, inputs, out);
    }
}

/// `out += A^T x` for a batch and a dense row-major `a`.
pub(super) fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
    let (rows, cols) = (x.len() / batch, out.len() / batch);
    for (x, out) in x.chunks_exact(rows).zip(out.chunks_exact_mut(cols)) {
        for (s, out) in out.chunks_mut(SPAN).enumerate() {
            for (a, x) in a.chunks(cols.saturating_mul(spec::ROW_CHUNK)).zip(x.chunks(spec::ROW_CHUNK)) {
                let mut sums = [0.0; SPAN];
                for (four, x) in a.chunks(cols.saturating_mul(4)).zip(x.chunks(4)) {
                    let mut products = [[0.0; SPAN]; 4];
                    for (products, (row, x)) in products.iter_mut().zip(four.chunks_exact(cols).zip(x)) {
                        for (product, a) in products.iter_mut().zip(&row[s * SPAN..][..out.len()]) {
                            *product = a * x;
                        }
                    }
                    add_fours(&mut sums, &products);
                }
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = canonical(*out + sum);
                }
            }
        }
    }
}

/// Adds the products of four rows to the sums of their columns.
#[inline(always)]
fn add_fours(sums: &mut [f32; SPAN], products: &[[f32; SPAN]; 4]) {
    for (c, sum) in sums.iter_mut().enumerate() {
        *sum += (products[0][c] + products[1][c]) + (products[2][c] + products[3][c]);
    }
}
