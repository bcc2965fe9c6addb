//! Dense f32 products, for adapters.

use core::arch::x86_64::*;

use super::vector::*;
use crate::isa::scalar;

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`; four rows at a time, which share the loads of `x`
/// and hide the latency of the additions.
#[target_feature(enable = "avx2")]
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

#[target_feature(enable = "avx2")]
#[inline]
fn dense_rows<const ROWS: usize>(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32; ROWS]) {
    let mut lanes = [_mm256_setzero_ps(); ROWS];
    let (vectors, x_rest) = x.as_chunks::<8>();
    let mut rows = a.chunks_exact(x.len());
    let rows: [_; ROWS] = core::array::from_fn(|_| rows.next().unwrap_or_default().as_chunks::<8>());
    for (i, x) in vectors.iter().enumerate() {
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            *lanes = _mm256_add_ps(*lanes, _mm256_mul_ps(load_f32(&row.0[i]), load_f32(x)));
        }
    }
    for ((out, lanes), (_, a_rest)) in out.iter_mut().zip(&mut lanes).zip(rows) {
        if !x_rest.is_empty() {
            // Zeros in the lanes without an element add 0, which changes none.
            let product = _mm256_mul_ps(load_padded(a_rest), load_padded(x_rest));
            *lanes = _mm256_add_ps(*lanes, product);
        }
        scalar::store_dense(out, add_lanes(*lanes), add);
    }
}

/// Up to eight f32, and zeros.
#[target_feature(enable = "avx2")]
#[inline]
fn load_padded(x: &[f32]) -> __m256 {
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    load_f32(&padded)
}
