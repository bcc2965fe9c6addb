//! Operations on the threads of a pool, by splits of rows.
//!
//! With the feature `rayon`, large operations are cut by rows into a part for each thread of the current pool; without it, and
//! for small ones, they run where they are called. No bit depends on that: operations give the same bits for every split,
//! and sums over rows (the transposed product) are cut at fixed places.

use core::ops::Range;

use nf4_kernels::{Activations, BlockSize, Float, Kernels, Nf4Matrix, ShapeError, spec::ROW_CHUNK};

use crate::buffer::zeros;

/// The least work of a thread, in multiply-adds of the 16x4 product, which take 70 microseconds on a core with AVX2. From
/// outside of the pool, two sleeping threads made work of 70 microseconds 0.75 times as fast as one thread did, of 140
/// microseconds 0.9 to 1.3 times, of 220 microseconds 1.1 to 1.7 times. Measured with
/// `cargo bench --features rayon --bench kernels -- --ratios` on two cores of a virtual machine.
const LEAST: usize = 1 << 21;

/// What the other operations take for a weight, or a weight and a vector, by the same measurement.
pub(crate) mod cost {
    pub(crate) const PRODUCT_16X4: usize = 1;
    pub(crate) const PRODUCT_F32: usize = 2;
    pub(crate) const TRANSPOSED: usize = 3;
    pub(crate) const DEQUANTIZE: usize = 3;
    pub(crate) const QUANTIZE: usize = 11;
}

#[cfg(feature = "rayon")]
use rayon::{current_num_threads as threads, join};

#[cfg(not(feature = "rayon"))]
fn threads() -> usize {
    1
}

#[cfg(not(feature = "rayon"))]
fn join<A, B>(a: impl FnOnce() -> A, b: impl FnOnce() -> B) -> (A, B) {
    (a(), b())
}

/// Parts that an operation with so much work is cut into.
fn parts(work: usize) -> usize {
    (work / LEAST).clamp(1, threads())
}

/// Runs `run` on ranges that make up `rows`, each with its part of `out`, `per_row` elements a row. `work` is what it takes in
/// all; see [`cost`].
///
/// # Errors
/// Those of `run`; of several, that of the first rows.
pub(crate) fn by_rows<T: Send, E: Send>(
    work: usize,
    rows: Range<usize>,
    per_row: usize,
    out: &mut [T],
    run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
) -> Result<(), E> {
    // A wrong length is for the operation itself to report.
    let fits = rows.len().checked_mul(per_row) == Some(out.len());
    split_rows(if fits { parts(work) } else { 1 }, rows, per_row, out, run)
}

fn split_rows<T: Send, E: Send>(
    parts: usize,
    rows: Range<usize>,
    per_row: usize,
    out: &mut [T],
    run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
) -> Result<(), E> {
    if parts <= 1 || rows.len() <= 1 {
        return run(rows, out);
    }
    let count = rows.len() / parts * (parts / 2) + rows.len() % parts * (parts / 2) / parts;
    let middle = rows.start + count;
    let (top, bottom) = out.split_at_mut(count * per_row);
    let (top, bottom) = join(
        || split_rows(parts / 2, rows.start..middle, per_row, top, run),
        || split_rows(parts - parts / 2, middle..rows.end, per_row, bottom, run),
    );
    top.and(bottom)
}

/// [`Kernels::gemm`].
pub(crate) fn gemm(k: Kernels, m: &Nf4Matrix<'_>, x: &Activations<'_>, out: &mut [f32]) -> Result<(), ShapeError> {
    let run = |rows, out: &mut [f32]| k.gemm(&m.row_range(rows)?, x, out);
    by_rows(work(m, x.batch() * cost::PRODUCT_16X4), 0..m.rows(), x.batch(), out, &run)
}

/// [`Kernels::gemm_f32`].
pub(crate) fn gemm_f32(k: Kernels, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    let batch = x.len().checked_div(m.cols()).unwrap_or(0);
    let run = |rows, out: &mut [f32]| k.gemm_f32(&m.row_range(rows)?, x, out);
    by_rows(work(m, batch * cost::PRODUCT_F32), 0..m.rows(), batch, out, &run)
}

/// [`Kernels::dequantize`].
pub(crate) fn dequantize<T: Float>(k: Kernels, m: &Nf4Matrix<'_>, out: &mut [T]) -> Result<(), ShapeError> {
    let run = |rows, out: &mut [T]| k.dequantize(&m.row_range(rows)?, out);
    by_rows(work(m, cost::DEQUANTIZE), 0..m.rows(), m.cols(), out, &run)
}

/// [`Kernels::gemv_transposed_f32`]. Threads take row chunks, whose sums are added in order; they need a vector of outputs for
/// each chunk, which one thread does not.
pub(crate) fn gemv_transposed_f32(k: Kernels, m: &Nf4Matrix<'_>, x: &[f32], out: &mut [f32]) -> Result<(), ShapeError> {
    let (chunks, cols) = (m.rows().div_ceil(ROW_CHUNK), m.cols());
    let work = work(m, cost::TRANSPOSED);
    if parts(work) == 1 || chunks <= 1 || x.len() != m.rows() || out.len() != cols {
        return k.gemv_transposed_f32(m, x, out);
    }
    let mut sums = zeros(chunks, cols)?;
    by_rows(work, 0..chunks, cols, &mut sums, &|chunks: Range<usize>, sums: &mut [f32]| {
        chunks.zip(sums.chunks_mut(cols)).try_for_each(|(chunk, sums)| {
            let rows = chunk * ROW_CHUNK..m.rows().min((chunk + 1) * ROW_CHUNK);
            k.gemv_transposed_f32(&m.row_range(rows.clone())?, &x[rows], sums)
        })
    })?;
    out.fill(0.0);
    for sums in sums.chunks(cols) {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = f32::from_f32(*out + sum));
    }
    Ok(())
}

/// [`Kernels::quantize`], by splits between blocks.
pub(crate) fn quantize<T: Float>(
    k: Kernels,
    weights: &[T],
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), ShapeError> {
    split_blocks(parts(weights.len().saturating_mul(cost::QUANTIZE)), k, weights, block_size, packed, absmax)
}

fn split_blocks<T: Float>(
    parts: usize,
    k: Kernels,
    weights: &[T],
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), ShapeError> {
    let blocks = block_size.blocks(weights.len()) / parts.max(1) * (parts / 2);
    let elements = blocks * block_size.get();
    // A wrong length is for the operation itself to report.
    if parts <= 1 || blocks == 0 || packed.len() < elements / 2 || absmax.len() < blocks {
        return k.quantize(weights, block_size, packed, absmax);
    }
    let ((w, weights), (p, packed)) = (weights.split_at(elements), packed.split_at_mut(elements / 2));
    let (a, absmax) = absmax.split_at_mut(blocks);
    let (first, second) = join(
        || split_blocks(parts / 2, k, w, block_size, p, a),
        || split_blocks(parts - parts / 2, k, weights, block_size, packed, absmax),
    );
    first.and(second)
}

/// What all weights of a matrix take at this cost of one.
fn work(m: &Nf4Matrix<'_>, cost: usize) -> usize {
    m.rows().saturating_mul(m.cols()).saturating_mul(cost)
}
