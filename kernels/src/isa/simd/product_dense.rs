//! The products with a dense matrix, whose elements are widened to f32.
//!
//! ```text
//! for 4 rows:
//!     for 2 vectors:                        or 1
//!         lanes[4][2] = 0                   in registers
//!         for 8 columns:
//!             x = inputs of the vectors
//!             for each row:
//!                 w = widen(elements)       once for the vectors
//!                 for each vector: lanes[row][vector] += w * x[vector]
//! ```
//!
//! The additions to a lane wait for each other, so at least four rows are needed to hide how long one takes.

use super::steps::{Floats, Steps, Widen};
use crate::float::Float;
use crate::isa::scalar::product_dense::store_dense;

/// Rows that share the loads of the inputs.
const ROWS: usize = 4;

/// How many bytes ahead of their use elements are prefetched, at least.
const AHEAD: usize = 2048;

/// Vectors that share the widened elements.
const VECTORS: usize = 2;

/// `out = A x`, or `out += factor * A x`, for a row-major `a`.
#[inline(always)]
pub(in crate::isa) fn gemv_dense<S: Widen<T>, T: Float>(
    steps: &Steps<S>,
    a: &[T],
    x: &[f32],
    add: Option<f32>,
    out: &mut [f32],
) {
    let mut rows = a.chunks_exact(x.len());
    let (several, rest) = out.as_chunks_mut::<ROWS>();
    for out in several {
        let products = tile(steps, core::array::from_fn::<_, ROWS, _>(|_| rows.next().unwrap_or_default()), [x]);
        // One branch for all rows.
        let outputs = out.iter_mut().zip(products);
        match add {
            None => outputs.for_each(|(out, [product])| store_dense(out, product, None)),
            Some(factor) => outputs.for_each(|(out, [product])| store_dense(out, product, Some(factor))),
        }
    }
    for (row, out) in rows.zip(rest) {
        let [[product]] = tile(steps, [row], [x]);
        store_dense(out, product, add);
    }
}

/// `out = A x` for a batch, `x` `[batch, cols]`, `out` `[rows, batch]`.
#[inline(always)]
pub(in crate::isa) fn gemm_dense<S: Widen<T>, T: Float>(
    steps: &Steps<S>,
    a: &[T],
    x: &[f32],
    batch: usize,
    out: &mut [f32],
) {
    let cols = x.len() / batch;
    let mut rows = a.chunks_exact(cols);
    let mut several = out.chunks_exact_mut(ROWS * batch);
    for out in &mut several {
        let rows = core::array::from_fn::<_, ROWS, _>(|_| rows.next().unwrap_or_default());
        multiply_rows(steps, rows, x, batch, out);
    }
    for (row, out) in rows.zip(several.into_remainder().chunks_exact_mut(batch)) {
        multiply_rows(steps, [row], x, batch, out);
    }
}

/// The products of some rows with all vectors.
#[inline(always)]
fn multiply_rows<S: Widen<T>, T: Float, const R: usize>(
    steps: &Steps<S>,
    rows: [&[T]; R],
    x: &[f32],
    batch: usize,
    out: &mut [f32],
) {
    let mut vectors = x.chunks_exact(x.len() / batch);
    let mut n = 0;
    while n + VECTORS <= batch {
        let several = core::array::from_fn::<_, VECTORS, _>(|_| vectors.next().unwrap_or_default());
        store(tile(steps, rows, several), &mut out[n..], batch);
        n += VECTORS;
    }
    for x in vectors {
        store(tile(steps, rows, [x]), &mut out[n..], batch);
        n += 1;
    }
}

/// Stores the products of a tile, whose first is the first of `out`.
#[inline(always)]
fn store<const R: usize, const N: usize>(products: [[f32; N]; R], out: &mut [f32], batch: usize) {
    for (out, products) in out.chunks_mut(batch).zip(products) {
        for (out, product) in out.iter_mut().zip(products) {
            store_dense(out, product, None);
        }
    }
}

/// The products of some rows and some vectors, all of one length.
#[inline(always)]
fn tile<S: Widen<T>, T: Float, const R: usize, const N: usize>(
    steps: &Steps<S>,
    rows: [&[T]; R],
    vectors: [&[f32]; N],
) -> [[f32; N]; R] {
    let mut lanes = [[steps.splat(0.0); N]; R];
    let (rows, vectors) = (rows.map(|row| row.as_chunks::<8>()), vectors.map(|x| x.as_chunks::<8>()));
    // Slices of one length, so that the loop has no checks.
    let eights = vectors[0].0.len();
    let (whole_rows, whole_vectors) = (rows.map(|(row, _)| &row[..eights]), vectors.map(|(x, _)| &x[..eights]));
    // The same columns of the next rows, or what comes soon if a row is short.
    let ahead = (R * size_of_val(rows[0].0)).max(AHEAD);
    for i in 0..eights {
        if N == 1 && (i * size_of::<[T; 8]>()).is_multiple_of(64) {
            whole_rows.iter().for_each(|row| steps.prefetch(&row[i], ahead));
        }
        let x = whole_vectors.map(|x| steps.load(&x[i]));
        for (lanes, row) in lanes.iter_mut().zip(whole_rows) {
            add_products(steps, lanes, steps.widen(&row[i]), x);
        }
    }
    if !vectors[0].1.is_empty() {
        // Zeros in the lanes without an element add 0, which changes none.
        let x = vectors.map(|(_, rest)| steps.load(&padded(rest, 0.0)));
        for (lanes, (_, rest)) in lanes.iter_mut().zip(rows) {
            add_products(steps, lanes, steps.widen(&padded(rest, T::from_f32(0.0))), x);
        }
    }
    // Not `map`, whose closure would not be compiled into this function, and so not for its instruction set.
    let mut products = [[0.0; N]; R];
    for (products, lanes) in products.iter_mut().zip(lanes) {
        for (product, lanes) in products.iter_mut().zip(lanes) {
            *product = steps.add_lanes(lanes);
        }
    }
    products
}

/// Adds the products of eight elements of a row to the lanes of the vectors.
#[inline(always)]
fn add_products<S: Floats, const N: usize>(
    steps: &Steps<S>,
    lanes: &mut [S::Lanes; N],
    row: S::Lanes,
    x: [S::Lanes; N],
) {
    for (lanes, x) in lanes.iter_mut().zip(x) {
        *lanes = steps.add(*lanes, steps.mul(row, x));
    }
}

/// Up to eight elements, and zeros.
#[inline(always)]
pub(super) fn padded<T: Copy>(rest: &[T], zero: T) -> [T; 8] {
    let mut padded = [zero; 8];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}
