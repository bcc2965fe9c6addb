//! The product of a dense matrix in portable code.

use crate::float::Float;
use crate::format::canonical;
use crate::spec;

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`.
pub(super) fn gemv_dense<T: Float>(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32]) {
    for (row, out) in a.chunks_exact(x.len()).zip(out) {
        store_dense(out, dot(row, x), add);
    }
}

/// `out = A x` for a batch, `out` `[rows, batch]`.
pub(super) fn gemm_dense<T: Float>(a: &[T], x: &[f32], batch: usize, out: &mut [f32]) {
    let cols = x.len() / batch;
    for (row, out) in a.chunks_exact(cols).zip(out.chunks_exact_mut(batch)) {
        for (x, out) in x.chunks_exact(cols).zip(out) {
            store_dense(out, dot(row, x), None);
        }
    }
}

/// `out += factor * A x` for vectors that stand side by side: `x` is `[cols, batch]`, `out` `[rows, batch]`.
pub(in crate::isa) fn gemm_dense_add(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]) {
    for (row, out) in a.chunks_exact(x.len() / batch).zip(out.chunks_exact_mut(batch)) {
        for (n, out) in out.iter_mut().enumerate() {
            store_dense(out, dot(row, x.iter().skip(n).step_by(batch)), Some(factor));
        }
    }
}

/// The product of a dense row and a vector.
fn dot<'x, T: Float>(row: &[T], x: impl IntoIterator<Item = &'x f32>) -> f32 {
    let (mut lanes, mut x) = ([0.0; 8], x.into_iter());
    for row in row.chunks(8) {
        for (lane, (a, x)) in lanes.iter_mut().zip(row.iter().zip(&mut x)) {
            *lane += a.to_f32() * x;
        }
    }
    spec::add_lanes(lanes)
}

/// What a dense row product does with its result.
#[inline(always)]
pub(crate) fn store_dense(out: &mut f32, product: f32, add: Option<f32>) {
    *out = canonical(match add {
        Some(factor) => *out + factor * product,
        None => product,
    });
}
