//! The loops of the transposed products of a batch, with packed and with dense weights.
//!
//! ```text
//! for 64 columns:
//!     for 64 vectors:
//!         for 512 rows:                                     a chunk
//!             sums[64][64] = 0
//!             for 64 rows:
//!                 panel = decode(64 rows, 64 columns)       once for all vectors, without absmax
//!                 for 8 vectors:
//!                     factors = absmax * x                  for the whole panel, before its loop
//!                     for a register of columns:
//!                         for 4 rows:
//!                             w = panel                     4 registers
//!                             for each vector: sums += (w[0] f[0] + w[1] f[1]) + (w[2] f[2] + w[3] f[3])
//!             out += sums
//! ```
//!
//! The panel and the sums stay in the nearest caches, the sums of a register of columns in registers for a whole panel.
//! Sums over rows run in the order of the definition for each column alone, so no bit depends on the tiles.

use core::ops::Range;

use super::steps::{Decode, Steps};
use super::steps_transposed::Columns;
use crate::format::canonical;
use crate::isa::scalar::product_transposed;
use crate::matrix::Nf4Matrix;
use crate::spec::{HALF_SPAN, ROW_CHUNK, SPAN};

/// Rows of a panel: 16 KB of decoded weights.
const ROWS: usize = 64;
/// Vectors whose sums are held at once: 16 KB.
const VECTORS: usize = 64;

/// The weights of some rows and columns.
#[repr(align(64))]
struct Panel {
    weights: [[f32; SPAN]; ROWS],
    /// Of each half of the columns and each row.
    absmax: [[f32; ROWS]; 2],
}

/// A matrix of which panels are made.
trait Rows<S> {
    /// Puts rows and columns from `row` and `column` on in a panel: as many rows as `rows` says, and columns as there are.
    fn fill(&self, steps: &Steps<S>, panel: &mut Panel, row: usize, rows: usize, column: usize);
}

impl<S: Decode<f32>> Rows<S> for Nf4Matrix<'_> {
    #[inline(always)]
    fn fill(&self, steps: &Steps<S>, panel: &mut Panel, row: usize, rows: usize, column: usize) {
        // The codebook as it is.
        let book = steps.book(1.0);
        for (i, weights) in panel.weights[..rows].iter_mut().enumerate() {
            let halves = self.halves(row + i, column / HALF_SPAN);
            for (half, ((packed, absmax), out)) in halves.zip(weights.as_chunks_mut().0).enumerate() {
                steps.decode(&book, packed, out);
                panel.absmax[half][i] = absmax;
            }
        }
    }
}

/// A row-major dense matrix with this number of columns.
struct Dense<'a> {
    weights: &'a [f32],
    cols: usize,
}

impl<S> Rows<S> for Dense<'_> {
    #[inline(always)]
    fn fill(&self, _: &Steps<S>, panel: &mut Panel, row: usize, rows: usize, column: usize) {
        panel.absmax = [[1.0; ROWS]; 2];
        let columns = (self.cols - column).min(SPAN);
        for (i, weights) in panel.weights[..rows].iter_mut().enumerate() {
            let row = &self.weights[(row + i) * self.cols + column..][..columns];
            if let Some(row) = row.first_chunk() {
                *weights = *row;
            } else {
                weights[..columns].copy_from_slice(row);
            }
        }
    }
}

/// `W^T x` for a batch, `inputs` `[batch, rows]`, `out` `[batch, cols]`, neither of them empty.
#[inline(always)]
pub(in crate::isa) fn gemm_transposed_f32<S: Columns>(
    steps: &Steps<S>,
    matrix: &Nf4Matrix<'_>,
    inputs: &[f32],
    out: &mut [f32],
) {
    if !matrix.has_whole_groups() {
        return product_transposed::gemm_transposed_f32(matrix, inputs, out);
    }
    out.fill(0.0);
    multiply(steps, matrix, inputs, [matrix.rows(), matrix.cols()], out);
}

/// `out += A^T x` for a batch, as [`gemm_transposed_f32`] with a dense row-major `a`.
#[inline(always)]
pub(in crate::isa) fn gemm_transposed_dense_add<S: Columns>(
    steps: &Steps<S>,
    a: &[f32],
    x: &[f32],
    batch: usize,
    out: &mut [f32],
) {
    let (rows, cols) = (x.len() / batch, out.len() / batch);
    multiply(steps, &Dense { weights: a, cols }, x, [rows, cols], out);
}

/// Adds the products of a matrix of any kind and all vectors to `out`.
#[inline(always)]
fn multiply<S: Columns>(
    steps: &Steps<S>,
    matrix: &impl Rows<S>,
    inputs: &[f32],
    [rows, cols]: [usize; 2],
    out: &mut [f32],
) {
    let mut panel = Panel { weights: [[0.0; SPAN]; ROWS], absmax: [[0.0; ROWS]; 2] };
    let mut sums = [[0.0; SPAN]; VECTORS];
    for column in (0..cols).step_by(SPAN) {
        let columns = (cols - column).min(SPAN);
        let tiles = inputs.chunks(rows.saturating_mul(VECTORS)).zip(out.chunks_mut(cols.saturating_mul(VECTORS)));
        for (inputs, out) in tiles {
            let sums = &mut sums[..inputs.len() / rows];
            for chunk in (0..rows).step_by(ROW_CHUNK) {
                sums.fill([0.0; SPAN]);
                for row in (chunk..rows.min(chunk + ROW_CHUNK)).step_by(ROWS) {
                    let count = (rows - row).min(ROWS);
                    matrix.fill(steps, &mut panel, row, count, column);
                    // Rows that are not there have products of +0.
                    panel.weights[count..count.next_multiple_of(4)].fill([0.0; SPAN]);
                    let pieces = Pieces { inputs, rows, piece: row..row + count };
                    add_panel(steps, &panel, &pieces, columns, sums);
                }
                for (sums, out) in sums.iter().zip(out.chunks_exact_mut(cols)) {
                    for (out, sum) in out[column..][..columns].iter_mut().zip(sums) {
                        *out = canonical(*out + sum);
                    }
                }
            }
        }
    }
}

/// The inputs of some vectors, of which a panel needs a piece each.
struct Pieces<'a> {
    inputs: &'a [f32],
    /// Of a vector.
    rows: usize,
    piece: Range<usize>,
}

impl Pieces<'_> {
    #[inline(always)]
    fn get(&self, vector: usize) -> &[f32] {
        &self.inputs[vector * self.rows..][self.piece.clone()]
    }
}

/// Adds the products of a panel and all vectors of a tile to their sums.
#[inline(always)]
fn add_panel<S: Columns>(
    steps: &Steps<S>,
    panel: &Panel,
    pieces: &Pieces<'_>,
    columns: usize,
    sums: &mut [[f32; SPAN]],
) {
    let mut vector = 0;
    while vector < sums.len() {
        let rest = &mut sums[vector..];
        vector += match rest.len() {
            8.. => add_vectors::<S, 8>(steps, panel, pieces, vector, columns, rest),
            4.. => add_vectors::<S, 4>(steps, panel, pieces, vector, columns, rest),
            2.. => add_vectors::<S, 2>(steps, panel, pieces, vector, columns, rest),
            _ => add_vectors::<S, 1>(steps, panel, pieces, vector, columns, rest),
        }
    }
}

/// Adds the products of a panel and the `N` vectors from `first` on to their sums, the first ones of `sums`. Returns `N`.
#[inline(always)]
fn add_vectors<S: Columns, const N: usize>(
    steps: &Steps<S>,
    panel: &Panel,
    pieces: &Pieces<'_>,
    first: usize,
    columns: usize,
    sums: &mut [[f32; SPAN]],
) -> usize {
    let count = pieces.piece.len();
    // Zeros for rows that are not there.
    let mut factors = [[[0.0; ROWS]; N]; 2];
    for (factors, absmax) in factors.iter_mut().zip(&panel.absmax) {
        for (v, factors) in factors.iter_mut().enumerate() {
            for ((factor, x), absmax) in factors.iter_mut().zip(pieces.get(first + v)).zip(absmax) {
                *factor = absmax * x;
            }
        }
    }
    let fours = &panel.weights.as_chunks::<4>().0[..count.div_ceil(4)];
    let Some(sums) = sums.first_chunk_mut::<N>() else { return N };
    for register in 0..columns.div_ceil(S::COLUMNS) {
        let factors = factors[register * S::COLUMNS / HALF_SPAN].each_ref().map(|factors| factors.as_chunks::<4>().0);
        let mut totals = [steps.splat_columns(0.0); N];
        for (total, sums) in totals.iter_mut().zip(&*sums) {
            *total = steps.load_columns(sums, register);
        }
        for (four, rows) in fours.iter().enumerate() {
            let [a, b, c, d] = rows.each_ref().map(|row| steps.load_columns(row, register));
            for (total, factors) in totals.iter_mut().zip(&factors) {
                let product = |w, i: usize| steps.mul_columns(w, steps.splat_columns(factors[four][i]));
                let first = steps.add_columns(product(a, 0), product(b, 1));
                let second = steps.add_columns(product(c, 2), product(d, 3));
                *total = steps.add_columns(*total, steps.add_columns(first, second));
            }
        }
        for (total, sums) in totals.into_iter().zip(&mut *sums) {
            steps.store_columns(sums, register, total);
        }
    }
    N
}
