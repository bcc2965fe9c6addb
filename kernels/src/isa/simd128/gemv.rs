//! The 16x4 product.

use core::arch::wasm32::*;

use super::dequantize::{look_up_u16, split_codes, u16_planes};
use super::vector::*;
use crate::absmax::Absmax;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::{NESTED_BLOCK, canonical};
use crate::matrix::Nf4Matrix;
use crate::spec;

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

/// The 16x4 product.
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1>(matrix, activations, out);
    } else {
        gemv_groups::<2>(matrix, activations, out);
    }
}

/// The 16x4 product with `GROUPS` activation groups in a span of 64 columns.
fn gemv_groups<const GROUPS: usize>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let (values, scales) = (activations.values(), activations.scales());
    let zero = [f32x4_splat(0.0); 2];
    let planes = i16_planes();
    let shift = matrix.groups_per_block_log2();
    if scales.is_empty() {
        return out.fill(0.0);
    }
    match matrix.absmax() {
        Absmax::Plain(absmax) => {
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let absmax = &absmax[blocks];
                let lanes =
                    add_columns::<GROUPS>(zero, packed, values, scales, &planes, |group| absmax[group >> shift]);
                *out = result(lanes);
            }
        }
        Absmax::Nested(nested) if scales.len().is_multiple_of(GROUPS) => {
            // What the codes stand for, in one nested block after the other.
            let (mut decoded, mut decoded_block) = ([0.0; 256], usize::MAX);
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let (mut lanes, mut start) = (zero, 0);
                while start < scales.len() {
                    let block = blocks.start + (start >> shift);
                    let nested_block = block / NESTED_BLOCK;
                    if nested_block != decoded_block {
                        (decoded, decoded_block) = (nested.values(nested_block), nested_block);
                    }
                    let end = scales.len().min(((nested_block + 1) * NESTED_BLOCK - blocks.start) << shift);
                    let columns = start * (SPAN / GROUPS)..end * (SPAN / GROUPS);
                    let codes = &nested.codes()[block..];
                    lanes = add_columns::<GROUPS>(
                        lanes,
                        &packed[columns.start / 2..columns.end / 2],
                        &values[columns],
                        &scales[start..end],
                        &planes,
                        |group| decoded[usize::from(codes[group >> shift])],
                    );
                    start = end;
                }
                *out = result(lanes);
            }
        }
        // A nested block may end in the middle of a span.
        Absmax::Nested(_) => {
            for (out, (packed, blocks)) in out.iter_mut().zip(matrix.aligned_rows()) {
                let absmax = |group| matrix.absmax_of_group(blocks.start, group);
                *out = result(add_columns::<GROUPS>(zero, packed, values, scales, &planes, absmax));
            }
        }
    }
}

/// The output of a row.
#[inline]
pub(super) fn result(lanes: F32x8) -> f32 {
    canonical(add_lanes(lanes) * spec::WEIGHT_STEP)
}

/// Adds consecutive columns of a row to the lanes: whole groups, as many as there are scales. `absmax` gives the one of
/// each.
#[inline]
fn add_columns<const GROUPS: usize>(
    mut lanes: F32x8,
    packed: &[u8],
    values: &[i16],
    scales: &[f32],
    planes: &[v128; 2],
    absmax: impl Fn(usize) -> f32,
) -> F32x8 {
    let (packed, half) = packed.as_chunks();
    let (values, _) = values.as_chunks();
    let (scales, scales_rest) = scales.as_chunks::<GROUPS>();
    let mut group = 0;
    for ((packed, values), scales) in packed.iter().zip(values).zip(scales) {
        // The last first: its check covers the others, whose loads the compiler can then join.
        let last = absmax(group + GROUPS - 1);
        let absmax = core::array::from_fn(|i| if i == GROUPS - 1 { last } else { absmax(group + i) });
        lanes = add_span::<GROUPS>(lanes, packed, values, &absmax, scales, planes);
        group += GROUPS;
    }
    if let ([scale], [.., values]) = (scales_rest, values)
        && GROUPS == 2
    {
        // The other half of the span has products of 0, which change no lane.
        let mut packed = [0; SPAN / 2];
        packed[..half.len()].copy_from_slice(half);
        lanes = add_span::<2>(lanes, &packed, values, &[absmax(group), 0.0], &[*scale, 0.0], planes);
    }
    lanes
}

/// Adds a span to the lanes.
#[inline]
fn add_span<const GROUPS: usize>(
    lanes: F32x8,
    packed: &[u8; SPAN / 2],
    values: &[i16; SPAN],
    absmax: &[f32; GROUPS],
    scales: &[f32; GROUPS],
    planes: &[v128; 2],
) -> F32x8 {
    let [low, high] = sums_of_span(decode_span(packed, planes), load_span(values));
    let sums = [f32x4_convert_i32x4(low), f32x4_convert_i32x4(high)];
    sum(lanes, product(sums, spread_products(absmax, scales)))
}

/// The products of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[inline]
fn spread_products<const GROUPS: usize>(absmax: &[f32; GROUPS], scales: &[f32; GROUPS]) -> F32x8 {
    spread::<GROUPS>(&core::array::from_fn(|i| absmax[i] * scales[i]))
}

/// The eight exact lane sums of the products of a span; see the top of the module.
#[inline]
pub(super) fn sums_of_span(w: [v128; 8], q: [v128; 8]) -> [v128; 2] {
    let dot = |i: usize| i32x4_dot_i16x8(w[i], q[i]);
    let half = |i: usize| i32x4_add(i32x4_add(dot(i), dot(i + 2)), i32x4_add(dot(i + 4), dot(i + 6)));
    [half(0), half(1)]
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[inline]
pub(super) fn decode_span(packed: &[u8; SPAN / 2], planes: &[v128; 2]) -> [v128; 8] {
    let mut weights = [i16x8_splat(0); 8];
    for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
        for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
            let [first, second] = look_up_u16(codes, planes);
            weights[4 * odd + half] = first;
            weights[4 * odd + half + 2] = second;
        }
    }
    weights
}

/// 64 weights or activations.
#[inline]
pub(super) fn load_span(values: &[i16; SPAN]) -> [v128; 8] {
    let mut out = [i16x8_splat(0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_i16(values);
    }
    out
}

/// The two bytes of each entry of the 16x4 codebook.
#[inline]
pub(super) fn i16_planes() -> [v128; 2] {
    let (book, _) = spec::CODEBOOK_I16.as_chunks();
    u16_planes([load_i16(&book[0]), load_i16(&book[1])])
}
