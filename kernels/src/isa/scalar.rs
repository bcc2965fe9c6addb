//! Portable code: any CPU, and the reference for the others.
//!
//! The last block of a tensor if it is partial, blocks that straddle rows and rests shorter than a register are handled
//! here for every instruction set.

use super::scalar_8x8;
use super::table::{FloatTable, Isa, Table};
use crate::activations::Activations;
use crate::double_quant;
use crate::float::Float;
use crate::format::{
    CODEBOOK, ZERO_CODE, absmax_from_bits, canonical, floored, get_range, inverse_absmax, nearest_code,
};
use crate::matrix::{Nf4Matrix, Segment};
use crate::spec::{self, ACTIVATION_MAX, SPAN};

pub(super) static TABLE: Table = Table {
    isa: Isa::Scalar,
    slots: &SLOTS,
    f32: floats(),
    f16: floats(),
    bf16: floats(),
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    gemv,
    gemm,
    slots_8x8: scalar_8x8::SLOTS,
    gemv_8x8: scalar_8x8::gemv,
    gemm_8x8: scalar_8x8::gemm,
    gemv_transposed_f32,
    gemm_transposed_f32,
    gemm_transposed_dense_add,
};

/// What exists for each type of elements.
const fn floats<T: Float>() -> FloatTable<T> {
    FloatTable {
        quantize,
        dequantize,
        quantize_activations,
        quantize_activations_8x8: scalar_8x8::quantize_activations,
        gemv_f32,
        gemm_f32,
        gemv_dense,
        gemm_dense,
    }
}

/// Activations stand in the order of the columns: a byte's two weights meet two adjacent ones.
pub(super) static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a column of a span is below 64")]
        {
            slots[column] = column as u8;
        }
        column += 1;
    }
    slots
};

/// Codes and absmax of a tensor.
fn quantize<T: Float>(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
    let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
    for ((block, packed), absmax) in blocks {
        if block.len() < block_size {
            *absmax = quantize_partial_block(block, packed);
        } else {
            *absmax = largest(block);
            let inverse = inverse_absmax(*absmax);
            pack(packed, block, |w| w * inverse);
        }
    }
}

/// The last block if it is not full: the floored absmax is what is stored, and the division is a true one
/// (`bitsandbytes` pads and reshapes whole blocks, and runs the rest through other code).
pub(super) fn quantize_partial_block<T: Float>(block: &[T], packed: &mut [u8]) -> f32 {
    let largest = largest(block);
    let absmax = floored(largest);
    // Zeros are not divided: where subnormal numbers count as zeros, the floor does.
    pack(packed, block, |w| if largest == 0.0 { 0.0 } else { w / absmax });
    absmax
}

/// The largest absolute value; NaN if there is one.
#[inline(always)]
fn largest<T: Float>(block: &[T]) -> f32 {
    absmax_from_bits(block.iter().map(|w| w.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

#[inline(always)]
fn pack<T: Float>(packed: &mut [u8], block: &[T], scaled: impl Fn(f32) -> f32) {
    for (byte, pair) in packed.iter_mut().zip(block.chunks(2)) {
        let high = nearest_code(scaled(pair[0].to_f32()));
        let low = pair.get(1).map_or(ZERO_CODE, |w| nearest_code(scaled(w.to_f32())));
        *byte = high << 4 | low;
    }
}

/// The weights, rounded once to f32 and once more to `T`.
fn dequantize<T: Float>(matrix: &Nf4Matrix<'_>, out: &mut [T]) {
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        dequantize_segment(matrix, &segment, out);
        rest = after;
    }
}

/// Part of a block that starts or ends anywhere.
pub(super) fn dequantize_segment<T: Float>(matrix: &Nf4Matrix<'_>, segment: &Segment<'_>, out: &mut [T]) {
    let values = CODEBOOK.map(|c| T::from_f32(c * segment.absmax));
    for (i, o) in out.iter_mut().enumerate() {
        *o = values[matrix.code(segment.start + i)];
    }
}

/// Quantizes inputs in groups, in the order of the columns.
fn quantize_activations<T: Float>(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32]) {
    // There are only these two; so the compiler knows that it is not 0.
    let group = if group == SPAN { SPAN } else { SPAN / 2 };
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        values.fill(0);
        for (g, (inputs, scale)) in inputs.chunks(group).zip(scales).enumerate() {
            let factor;
            (*scale, factor) = activation_scale(largest_input(inputs), f32::from(ACTIVATION_MAX));
            if factor > 0.0 {
                for (x, value) in inputs.iter().zip(values.iter_mut().skip(g * group)) {
                    #[allow(clippy::cast_possible_truncation, reason = "|x| <= 8191, so the low 16 bits hold it")]
                    {
                        *value = round_to_bits(x.to_f32() * factor) as i16;
                    }
                }
            }
        }
    }
}

/// The largest absolute input by its bits: NaN, if there is one.
#[inline(always)]
pub(super) fn largest_input<T: Float>(inputs: &[T]) -> f32 {
    f32::from_bits(inputs.iter().map(|x| x.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// Scale of a group and factor that its inputs are multiplied by (0: all values are 0), from the largest absolute
/// input and the largest value.
#[inline(always)]
pub(super) fn activation_scale(largest: f32, max: f32) -> (f32, f32) {
    let factor = max / largest;
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if factor.is_infinite() {
        (0.0, 0.0)
    } else {
        (largest / max, factor)
    }
}

/// Nearest integer, ties to even, of `|x| < 2^22`, in the low bits: adding 1.5 * 2^23 leaves it in the low bits of the
/// mantissa.
#[inline(always)]
pub(super) fn round_to_bits(x: f32) -> u32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits()
}

/// The 16x4 product.
fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot(matrix, row, activations);
    }
}

/// The 16x4 product of a batch.
fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(activations.batch()).enumerate() {
        for (n, out) in out.iter_mut().enumerate() {
            *out = dot(matrix, row, &activations.vector(n));
        }
    }
}

/// The 16x4 product of a row and a vector.
fn dot(matrix: &Nf4Matrix<'_>, row: usize, activations: &Activations<'_>) -> f32 {
    let (packed, first_block) = matrix.aligned_row(row);
    let mut factors = group_factors(matrix, first_block, activations);
    let mut lanes = [0.0; 8];
    let (spans, rest) = packed.as_chunks::<{ SPAN / 2 }>();
    let (values, _) = activations.values().as_chunks::<SPAN>();
    for (bytes, values) in spans.iter().zip(values) {
        add_span(&mut lanes, span_sums(bytes, values), next_factors(&mut factors, activations.group()));
    }
    if let (Some(values), false) = (values.get(spans.len()), rest.is_empty()) {
        add_half_span(&mut lanes, rest, values, factors.next().unwrap_or(0.0));
    }
    canonical(spec::add_lanes(lanes) * spec::WEIGHT_STEP)
}

/// The product of absmax and activation scale of each group of a row.
#[inline(always)]
fn group_factors(
    matrix: &Nf4Matrix<'_>,
    first_block: usize,
    activations: &Activations<'_>,
) -> impl Iterator<Item = f32> {
    let scales = activations.scales().iter().enumerate();
    scales.map(move |(group, scale)| matrix.absmax_of_group(first_block, group) * scale)
}

/// The factors of the two halves of a span.
#[inline(always)]
fn next_factors(factors: &mut impl Iterator<Item = f32>, group: usize) -> [f32; 2] {
    let first = factors.next().unwrap_or(0.0);
    [first, if group == SPAN { first } else { factors.next().unwrap_or(0.0) }]
}

/// Adds a span to the lanes.
#[inline(always)]
fn add_span(lanes: &mut [f32; 8], sums: [i32; 8], factors: [f32; 2]) {
    for (l, (lane, sum)) in lanes.iter_mut().zip(sums).enumerate() {
        *lane = add_scaled(*lane, sum, factors[l / 4]);
    }
}

/// Adds the last span of a row if it has only the first 32 columns: the other activations are 0, and so is the other
/// factor, so they change no lane.
#[cold]
pub(super) fn add_half_span(lanes: &mut [f32; 8], rest: &[u8], values: &[i16; SPAN], factor: f32) {
    let mut bytes = [0; SPAN / 2];
    for (byte, rest) in bytes.iter_mut().zip(rest) {
        *byte = *rest;
    }
    add_span(lanes, span_sums(&bytes, values), [factor, 0.0]);
}

/// A lane with an exact sum added, as f32 and times its factor.
#[inline(always)]
pub(super) fn add_scaled(lane: f32, sum: i32, factor: f32) -> f32 {
    #[allow(clippy::cast_precision_loss, reason = "this rounding is part of the definition")]
    let sum = sum as f32;
    lane + sum * factor
}

/// The weights of the two columns of each packed byte, so that one look-up gives both; 1 KB.
pub(super) static PAIRS: Pairs = Pairs({
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [spec::CODEBOOK_I16[byte >> 4], spec::CODEBOOK_I16[byte & 15]];
        byte += 1;
    }
    pairs
});

/// Aligned, so that one load takes both weights.
#[repr(align(4))]
pub(super) struct Pairs(pub(super) [[i16; 2]; 256]);

/// The activations of the two columns of a byte of a span.
#[inline(always)]
pub(super) fn pair(values: &[i16; SPAN], byte: usize) -> [i16; 2] {
    values.as_chunks().0[byte % (SPAN / 2)]
}

/// The eight exact lane sums of a span.
#[inline(always)]
fn span_sums(bytes: &[u8; SPAN / 2], values: &[i16; SPAN]) -> [i32; 8] {
    core::array::from_fn(|lane| {
        let first = lane / 4 * 16 + lane % 4 * 2;
        let products = [first, first + 1, first + 8, first + 9].map(|i| {
            let ([high, low], [even, odd]) = (PAIRS.0[usize::from(bytes[i % (SPAN / 2)])], pair(values, i));
            i32::from(high) * i32::from(even) + i32::from(low) * i32::from(odd)
        });
        products.iter().sum()
    })
}

/// The f32 product of a matrix of any shape.
pub(super) fn gemv_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot_f32(matrix, row, inputs);
    }
}

/// The f32 product of a batch, with a matrix of any shape.
pub(super) fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(inputs.len() / matrix.cols()).enumerate() {
        for (inputs, out) in inputs.chunks_exact(matrix.cols()).zip(out) {
            *out = dot_f32(matrix, row, inputs);
        }
    }
}

/// The f32 product of a row and a vector.
fn dot_f32<T: Float>(matrix: &Nf4Matrix<'_>, row: usize, inputs: &[T]) -> f32 {
    let mut start = matrix.row_start(row);
    let mut sum = 0.0;
    for panel in inputs.chunks(spec::PANEL) {
        let mut lanes = [0.0; 8];
        for inputs in panel.chunks(SPAN) {
            for segment in matrix.segments(start, start + inputs.len()) {
                add_segment(matrix, &segment, segment.start - start, inputs, &mut lanes);
            }
            start += inputs.len();
        }
        sum += spec::add_lanes(lanes);
    }
    canonical(sum)
}

/// Adds the products of the columns of a span that lie in one block; the first is column `skip` of the span.
fn add_segment<T: Float>(
    matrix: &Nf4Matrix<'_>,
    segment: &Segment<'_>,
    skip: usize,
    inputs: &[T],
    lanes: &mut [f32; 8],
) {
    let mut products = [0.0; SPAN];
    let mut present = [false; 8];
    let columns = skip..skip + segment.len;
    let inputs = get_range(inputs, columns.clone());
    for (i, (x, slot)) in inputs.iter().zip(get_range(&spec::F32_SLOTS, columns)).enumerate() {
        let slot = usize::from(*slot) % SPAN;
        products[slot] = CODEBOOK[matrix.code(segment.start + i)] * x.to_f32();
        present[slot % 8] = true;
    }
    // A lane without a column in this segment must not meet the block's absmax, which may be infinite.
    for ((lane, sum), present) in lanes.iter_mut().zip(spec::add_places(&products)).zip(present) {
        if present {
            *lane += sum * segment.absmax;
        }
    }
}

/// The f32 product with the transpose of a matrix of any shape.
pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
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
pub(super) fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    for (inputs, out) in inputs.chunks_exact(matrix.rows()).zip(out.chunks_exact_mut(matrix.cols())) {
        gemv_transposed_f32(matrix, inputs, out);
    }
}

/// `out += A^T x` for a batch and a dense row-major `a`.
fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
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

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`.
fn gemv_dense<T: Float>(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32]) {
    for (row, out) in a.chunks_exact(x.len()).zip(out) {
        store_dense(out, dot_dense(row, x), add);
    }
}

/// `out = A x` for a batch, `out` `[rows, batch]`.
fn gemm_dense<T: Float>(a: &[T], x: &[f32], batch: usize, out: &mut [f32]) {
    let cols = x.len() / batch;
    for (row, out) in a.chunks_exact(cols).zip(out.chunks_exact_mut(batch)) {
        for (x, out) in x.chunks_exact(cols).zip(out) {
            store_dense(out, dot_dense(row, x), None);
        }
    }
}

/// The product of a dense row and a vector.
fn dot_dense<T: Float>(row: &[T], x: &[f32]) -> f32 {
    let mut lanes = [0.0; 8];
    for (row, x) in row.chunks(8).zip(x.chunks(8)) {
        for (lane, (a, x)) in lanes.iter_mut().zip(row.iter().zip(x)) {
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
