//! The 16x4 product in portable code.

use crate::activations::Activations;
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec::{self, SPAN};

/// The 16x4 product.
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        *out = dot(matrix, row, activations);
    }
}

/// The 16x4 product of a batch.
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
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
pub(in crate::isa) fn add_half_span(lanes: &mut [f32; 8], rest: &[u8], values: &[i16; SPAN], factor: f32) {
    let mut bytes = [0; SPAN / 2];
    for (byte, rest) in bytes.iter_mut().zip(rest) {
        *byte = *rest;
    }
    add_span(lanes, span_sums(&bytes, values), [factor, 0.0]);
}

/// A lane with an exact sum added, as f32 and times its factor.
#[inline(always)]
pub(in crate::isa) fn add_scaled(lane: f32, sum: i32, factor: f32) -> f32 {
    #[allow(clippy::cast_precision_loss, reason = "this rounding is part of the definition")]
    let sum = sum as f32;
    lane + sum * factor
}

/// The weights of the two columns of each packed byte, so that one look-up gives both; 1 KB.
pub(in crate::isa) static PAIRS: Pairs = Pairs({
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
pub(in crate::isa) struct Pairs(pub(in crate::isa) [[i16; 2]; 256]);

/// The activations of the two columns of a byte of a span.
#[inline(always)]
pub(in crate::isa) fn pair(values: &[i16; SPAN], byte: usize) -> [i16; 2] {
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
