//! The product with a dense matrix.

use super::steps::{Floats, Steps};
use crate::isa::scalar;

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`; four rows at a time, which share the loads of `x`
/// and hide the latency of the additions.
#[inline(always)]
pub(in crate::isa) fn gemv_dense<S: Floats>(steps: &Steps<S>, a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32]) {
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (a, a_rest) = a.split_at(fours.len() * 4 * x.len());
    for (a, out) in a.chunks_exact(4 * x.len()).zip(fours) {
        dense_rows(steps, a, x, add, out);
    }
    for (a, out) in a_rest.chunks_exact(x.len()).zip(rest) {
        dense_rows(steps, a, x, add, core::array::from_mut(out));
    }
}

#[inline(always)]
fn dense_rows<S: Floats, const ROWS: usize>(
    steps: &Steps<S>,
    a: &[f32],
    x: &[f32],
    add: Option<f32>,
    out: &mut [f32; ROWS],
) {
    let mut lanes = [steps.splat(0.0); ROWS];
    let (eights, x_rest) = x.as_chunks::<8>();
    let mut rows = a.chunks_exact(x.len());
    // Slices of the length of `eights`, so that the loop below checks no index.
    let rows: [_; ROWS] = core::array::from_fn(|_| {
        let (row, rest) = rows.next().unwrap_or_default().as_chunks::<8>();
        (row.get(..eights.len()).unwrap_or_default(), rest)
    });
    for (i, x) in eights.iter().enumerate() {
        let x = steps.load(x);
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            *lanes = steps.add(*lanes, steps.mul(steps.load(&row.0[i]), x));
        }
    }
    if !x_rest.is_empty() {
        let x = load_padded(steps, x_rest);
        for (lanes, (_, rest)) in lanes.iter_mut().zip(rows) {
            // Zeros in the lanes without an element add 0, which changes none.
            *lanes = steps.add(*lanes, steps.mul(load_padded(steps, rest), x));
        }
    }
    // All sums first: the rest is then the same for all rows, without a branch for each.
    let sums: [f32; ROWS] = core::array::from_fn(|row| steps.add_lanes(lanes[row]));
    match add {
        None => out.iter_mut().zip(sums).for_each(|(out, sum)| scalar::store_dense(out, sum, None)),
        Some(factor) => out.iter_mut().zip(sums).for_each(|(out, sum)| scalar::store_dense(out, sum, Some(factor))),
    }
}

/// Up to eight f32, and zeros.
#[inline(always)]
fn load_padded<S: Floats>(steps: &Steps<S>, x: &[f32]) -> S::Lanes {
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    steps.load(&padded)
}
