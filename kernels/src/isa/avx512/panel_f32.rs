//! The f32 product of a batch: rows in the lanes of a register.
//!
//! As in `panel.rs` a register holds one of a row's eight lanes, of sixteen rows, and inputs are broadcast by the loads
//! of the multiplications. So inputs are taken as they are, in any order of columns, and the lanes of a row meet in
//! additions of whole registers. The weights of sixteen rows and some spans are decoded once for many vectors, and a
//! pass over the panel takes one lane of four vectors at a time:
//!
//! ```text
//! for each span:
//!     w = weights of the lane               eight places of sixteen rows, in registers
//!     for each vector:
//!         p[j] = w[j] * broadcast(x[j])     for the column of each place
//!         lane += (((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))) * absmax
//! ```
//!
//! Inputs of 16 bits are widened for the columns of a panel, once for all its lanes.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;
use core::ops::Range;

use super::PANEL_BATCH;
use super::codes::transpose;
use super::registers::{load_f32, store_f32};
use crate::float::Float;
use crate::format::{CODEBOOK, canonical};
use crate::isa::avx2::{self, Avx2};
use crate::isa::scalar::product_f32;
use crate::isa::simd::product_16x4::padded;
use crate::isa::simd::steps::{Decode, Widen};
use crate::matrix::Nf4Matrix;
use crate::spec::{HALF_SPAN, PANEL, SPAN};

/// Rows of a register.
const ROWS: usize = 16;
/// Spans of a panel: 16 KB of decoded weights.
const SPANS: usize = 4;
/// Vectors that share a panel: 32 KB of lanes.
const VECTORS: usize = 64;

/// An f32 of each row.
type Rows = [f32; ROWS];

/// The lanes of a vector.
type Lanes = [Rows; 8];

/// Decoded weights, and the absmax of each half of a span.
#[repr(align(64))]
struct Panel {
    /// Of each lane and span the eight places.
    weights: [[[Rows; 8]; SPANS]; 8],
    absmax: [[Rows; SPANS]; 2],
}

/// The lanes of a tile of vectors.
#[repr(align(64))]
struct Tile([Lanes; VECTORS]);

/// Inputs of the vectors of a tile for a panel, 64 KB. Each vector has a line more than it needs, because rows that are a
/// power of two apart share few places of the nearest cache.
#[repr(align(64))]
struct Wide([[f32; WIDE]; VECTORS]);

const WIDE: usize = SPANS * SPAN + 16;

/// The f32 product of a batch.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
pub(super) fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Avx2: Widen<T> + Decode<T>,
{
    if !matrix.has_whole_groups() {
        return product_f32::gemm_f32(matrix, inputs, out);
    }
    let batch = inputs.len() / matrix.cols();
    let rows = if batch < PANEL_BATCH { 0 } else { matrix.rows() / ROWS * ROWS };
    let (panels, rest) = out.split_at_mut(rows * batch);
    for (first_row, out) in (0..).step_by(ROWS).zip(panels.chunks_exact_mut(ROWS * batch)) {
        multiply(matrix, first_row, inputs, out);
    }
    if let (false, Ok(matrix)) = (rest.is_empty(), matrix.row_range(rows..matrix.rows())) {
        avx2::gemm_f32(&matrix, inputs, rest);
    }
}

/// The products of sixteen rows and all vectors.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl")]
#[inline]
fn multiply<T: Float>(matrix: &Nf4Matrix<'_>, first_row: usize, inputs: &[T], out: &mut [f32])
where
    Avx2: Widen<T>,
{
    let (cols, batch) = (matrix.cols(), inputs.len() / matrix.cols());
    let mut panel = Panel { weights: [[[[0.0; ROWS]; 8]; SPANS]; 8], absmax: [[[0.0; ROWS]; SPANS]; 2] };
    let mut tile = Tile([[[0.0; ROWS]; 8]; VECTORS]);
    let mut wide = Wide([[0.0; WIDE]; VECTORS]);
    out.fill(0.0);
    for (first, inputs) in (0..batch).step_by(VECTORS).zip(inputs.chunks(VECTORS * cols)) {
        let lanes = &mut tile.0[..inputs.len() / cols];
        for column in (0..cols).step_by(SPANS * SPAN) {
            let end = cols.min(column + SPANS * SPAN);
            if column.is_multiple_of(PANEL) {
                lanes.fill([[0.0; ROWS]; 8]);
            }
            fill_panel(&mut panel, matrix, first_row, column, end - column);
            let (x, stride, columns) = match T::as_f32(inputs) {
                Some(inputs) => (inputs, cols, column..end),
                None => {
                    for (inputs, wide) in inputs.chunks(cols).zip(&mut wide.0) {
                        widen(&inputs[column..end], wide);
                    }
                    (wide.0.as_flattened(), WIDE, 0..end - column)
                }
            };
            for lane in 0..8 {
                add_lane(&panel, lane, x, stride, columns.clone(), lanes);
            }
            if end == cols || end.is_multiple_of(PANEL) {
                for (vector, lanes) in (first..).zip(&*lanes) {
                    for (out, y) in out.chunks_exact_mut(batch).zip(add_lanes(lanes)) {
                        out[vector] += y;
                    }
                }
            }
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Inputs as f32, of which there are a multiple of eight.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen<T: Float>(inputs: &[T], out: &mut [f32; WIDE])
where
    Avx2: Widen<T>,
{
    let steps: Avx2 = avx2::avx2();
    for (inputs, out) in inputs.as_chunks().0.iter().zip(out.as_chunks_mut::<8>().0) {
        // SAFETY: this function has the features of the step.
        *out = bytemuck::must_cast(unsafe { Widen::<T>::widen(&steps, inputs) });
    }
}

/// Decodes columns of sixteen rows, without absmax.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn fill_panel(panel: &mut Panel, matrix: &Nf4Matrix<'_>, first_row: usize, column: usize, columns: usize) {
    // The same columns of the next rows.
    let ahead = if first_row + 2 * ROWS <= matrix.rows() { ROWS * matrix.cols() / 2 } else { 0 };
    for row in 0..ROWS {
        let (_, group) = matrix.grouped_row(first_row + row);
        for half in 0..columns / HALF_SPAN {
            panel.absmax[half % 2][half / 2][row] = matrix.absmax_of_group_8x8(group + column / HALF_SPAN + half);
        }
    }
    let (whole, half) = pieces(matrix, first_row, column, columns);
    for span in 0..whole[0].len() {
        if span.is_multiple_of(2) {
            for row in whole {
                avx2::prefetch(&row[span], ahead);
            }
        }
        decode_span(panel, span, spans(&whole, span));
    }
    if !half[0].is_empty() {
        decode_span(panel, whole[0].len(), half.map(padded).each_ref());
    }
}

// What follows has no features of its own, so that its closures are inlined, as in `panel.rs`.

/// The whole spans of some columns of each row, and the bytes of half a span if one follows.
#[inline(always)]
fn pieces<'a>(
    matrix: &Nf4Matrix<'a>,
    first_row: usize,
    column: usize,
    columns: usize,
) -> ([&'a [[u8; SPAN / 2]]; ROWS], [&'a [u8]; ROWS]) {
    let pieces: [_; ROWS] =
        core::array::from_fn(|r| matrix.grouped_row(first_row + r).0[column / 2..(column + columns) / 2].as_chunks());
    (pieces.map(|(whole, _)| whole), pieces.map(|(_, half)| half))
}

/// Some columns of the `V` vectors from `first` on.
#[inline(always)]
fn parts<'a, const V: usize>(inputs: &'a [f32], cols: usize, first: usize, columns: &Range<usize>) -> [&'a [f32]; V] {
    core::array::from_fn(|v| &inputs[(first + v) * cols..][columns.clone()])
}

/// A span of each row.
#[inline(always)]
fn spans<'a>(whole: &[&'a [[u8; SPAN / 2]]; ROWS], span: usize) -> [&'a [u8; SPAN / 2]; ROWS] {
    whole.map(|row| &row[span])
}

/// Decodes a span: `vpermps` takes the lowest four bits of each word, so a code only has to be shifted there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn decode_span(panel: &mut Panel, span: usize, packed: [&[u8; SPAN / 2]; ROWS]) {
    let book = load_f32(&CODEBOOK);
    // Word `w` has columns `8w..8w + 8`: in each byte a column of place `w % 4` and one of place `4 + w % 4`.
    for (w, words) in transpose(packed).into_iter().enumerate() {
        for (byte, bits) in [0, 8, 16, 24].into_iter().enumerate() {
            let places = &mut panel.weights[w / 4 * 4 + byte][span];
            let (high, low) = (_mm512_set1_epi32(bits + 4), _mm512_set1_epi32(bits));
            store_f32(&mut places[w % 4], _mm512_permutexvar_ps(_mm512_srlv_epi32(words, high), book));
            store_f32(&mut places[4 + w % 4], _mm512_permutexvar_ps(_mm512_srlv_epi32(words, low), book));
        }
    }
}

/// Adds the products of a lane of the panel and all vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn add_lane(panel: &Panel, lane: usize, inputs: &[f32], cols: usize, columns: Range<usize>, lanes: &mut [Lanes]) {
    // Half a span, at the end of a row, has no lanes 4-7.
    let spans = (columns.len() + HALF_SPAN * usize::from(lane < 4)) / SPAN;
    if spans == 0 {
        return;
    }
    // The first column of the lane in a span.
    let start = lane / 4 * HALF_SPAN + lane % 4 * 2;
    let columns = columns.start + start..columns.end;
    let (fours, rest) = lanes.as_chunks_mut::<4>();
    let first_of_rest = fours.len() * 4;
    for (i, lanes) in fours.iter_mut().enumerate() {
        add_vectors::<4>(panel, lane, spans, parts(inputs, cols, 4 * i, &columns), lanes);
    }
    for (i, lanes) in rest.iter_mut().enumerate() {
        let x = parts(inputs, cols, first_of_rest + i, &columns);
        add_vectors::<1>(panel, lane, spans, x, core::array::from_mut(lanes));
    }
}

/// Adds the products of a lane of the panel and `V` vectors, from the first column of the lane on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn add_vectors<const V: usize>(panel: &Panel, lane: usize, spans: usize, x: [&[f32]; V], lanes: &mut [Lanes; V]) {
    let mut totals = [_mm512_setzero_ps(); V];
    for (total, lanes) in totals.iter_mut().zip(&*lanes) {
        *total = load_f32(&lanes[lane]);
    }
    let weights = panel.weights[lane].iter().zip(&panel.absmax[lane / 4]);
    for (span, (weights, absmax)) in weights.enumerate().take(spans) {
        let mut w = [_mm512_setzero_ps(); 8];
        for (w, weights) in w.iter_mut().zip(weights) {
            *w = load_f32(weights);
        }
        let absmax = load_f32(absmax);
        for v in 0..V {
            // From the first place to the last are 26 columns.
            let Some(x) = x[v].get(span * SPAN..).and_then(<[f32]>::first_chunk::<26>) else { return };
            let mut p = [_mm512_setzero_ps(); 8];
            for j in 0..8 {
                p[j] = _mm512_mul_ps(w[j], _mm512_set1_ps(x[j % 4 * 8 + j / 4]));
            }
            let first = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
            let second = _mm512_add_ps(_mm512_add_ps(p[4], p[5]), _mm512_add_ps(p[6], p[7]));
            totals[v] = _mm512_add_ps(totals[v], _mm512_mul_ps(_mm512_add_ps(first, second), absmax));
        }
    }
    for (total, lanes) in totals.into_iter().zip(lanes) {
        store_f32(&mut lanes[lane], total);
    }
}

/// [`crate::spec::add_lanes`] of each row.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_lanes(lanes: &Lanes) -> Rows {
    let l = |i: usize| load_f32(&lanes[i]);
    let even = _mm512_add_ps(_mm512_add_ps(l(0), l(4)), _mm512_add_ps(l(2), l(6)));
    let odd = _mm512_add_ps(_mm512_add_ps(l(1), l(5)), _mm512_add_ps(l(3), l(7)));
    let mut sums = [0.0; ROWS];
    store_f32(&mut sums, _mm512_add_ps(even, odd));
    sums
}
