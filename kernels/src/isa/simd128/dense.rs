//! Dense f32 products, for adapters.

use core::arch::wasm32::*;

use super::vector::*;
use crate::isa::scalar;

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`; four rows at a time, which share the loads of `x`
/// and hide the latency of the additions.
pub(super) fn gemv_dense(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32]) {
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (a, a_rest) = a.split_at(fours.len() * 4 * x.len());
    for (a, out) in a.chunks_exact(4 * x.len()).zip(fours) {
        dense_rows(a, x, add, out);
    }
    for (a, out) in a_rest.chunks_exact(x.len()).zip(rest) {
        dense_rows(a, x, add, core::array::from_mut(out));
    }
}

#[inline]
fn dense_rows<const ROWS: usize>(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32; ROWS]) {
    let mut lanes = [[f32x4_splat(0.0); 2]; ROWS];
    let (vectors, x_rest) = x.as_chunks::<8>();
    let mut rows = a.chunks_exact(x.len());
    let rows: [_; ROWS] = core::array::from_fn(|_| rows.next().unwrap_or_default().as_chunks::<8>());
    for (i, x) in vectors.iter().enumerate() {
        let x = load_f32(x);
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            *lanes = sum(*lanes, product(load_f32(&row.0[i]), x));
        }
    }
    for ((out, lanes), (_, a_rest)) in out.iter_mut().zip(&mut lanes).zip(rows) {
        if !x_rest.is_empty() {
            // Zeros in the lanes without an element add 0, which changes none.
            *lanes = sum(*lanes, product(load_padded(a_rest), load_padded(x_rest)));
        }
        scalar::store_dense(out, add_lanes(*lanes), add);
    }
}

/// Up to eight f32, and zeros.
#[inline]
fn load_padded(x: &[f32]) -> F32x8 {
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    load_f32(&padded)
}
