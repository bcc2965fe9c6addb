//! The product of a dense matrix with vectors that stand side by side, added to outputs, for matrices of few columns: `B` of
//! an adapter, whose rows are too short to be worth adding up.
//!
//! ```text
//! for 64 vectors:
//!     panel = their inputs                                  64 for each column
//!     for each row:
//!         for a register of vectors:
//!             lanes[8] = 0                                  in registers
//!             for each column c: lanes[c % 8] += a[c] * panel[c]
//!             out += factor * add_lanes(lanes)
//! ```
//!
//! So the eight lanes of an output are in eight registers, and adding them up takes as long for all vectors of a register as
//! for one.

use super::product_dense::padded;
use super::steps::Steps;
use super::steps_transposed::Columns;
use crate::format::canonical;
use crate::isa::FEW_COLUMNS;
use crate::isa::scalar::product_dense;
use crate::spec::SPAN;

/// `out += factor * A x`: `a` is `[rows, cols]`, `x` `[cols, batch]`, `out` `[rows, batch]`.
#[inline(always)]
pub(in crate::isa) fn gemm_dense_add<S: Columns>(
    steps: &Steps<S>,
    a: &[f32],
    x: &[f32],
    batch: usize,
    factor: f32,
    out: &mut [f32],
) {
    let cols = x.len() / batch;
    if cols > FEW_COLUMNS {
        return product_dense::gemm_dense_add(a, x, batch, factor, out);
    }
    let mut panel = [[0.0; SPAN]; FEW_COLUMNS];
    // Zeros for columns that are not there.
    let panel = &mut panel.as_chunks_mut::<8>().0[..cols.div_ceil(8)];
    for first in (0..batch).step_by(SPAN) {
        let count = (batch - first).min(SPAN);
        for (panel, x) in panel.as_flattened_mut().iter_mut().zip(x.chunks_exact(batch)) {
            panel[..count].copy_from_slice(&x[first..][..count]);
        }
        for (row, out) in a.chunks_exact(cols).zip(out.chunks_exact_mut(batch)) {
            add_row(steps, row, panel, factor, &mut out[first..][..count]);
        }
    }
}

/// Adds the products of a row to the outputs of the vectors of a panel.
#[inline(always)]
fn add_row<S: Columns>(steps: &Steps<S>, row: &[f32], panel: &[[[f32; SPAN]; 8]], factor: f32, out: &mut [f32]) {
    let (eights, rest) = row.as_chunks::<8>();
    // Its zeros add 0 to lanes, which changes none.
    let rest = (!rest.is_empty()).then(|| padded(rest, 0.0));
    let mut products = [0.0; SPAN];
    for register in 0..out.len().div_ceil(S::COLUMNS) {
        let mut lanes = [steps.splat_columns(0.0); 8];
        for (eight, panel) in eights.iter().chain(&rest).zip(panel) {
            for (lane, (a, x)) in lanes.iter_mut().zip(eight.iter().zip(panel)) {
                let product = steps.mul_columns(steps.splat_columns(*a), steps.load_columns(x, register));
                *lane = steps.add_columns(*lane, product);
            }
        }
        // The order of `add_lanes`.
        let add = |a, b| steps.add_columns(lanes[a], lanes[b]);
        let (even, odd) = (steps.add_columns(add(0, 4), add(2, 6)), steps.add_columns(add(1, 5), add(3, 7)));
        let product = steps.mul_columns(steps.splat_columns(factor), steps.add_columns(even, odd));
        steps.store_columns(&mut products, register, product);
    }
    for (out, product) in out.iter_mut().zip(&products) {
        *out = canonical(*out + product);
    }
}
