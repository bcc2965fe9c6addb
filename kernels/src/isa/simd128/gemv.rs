//! The 16x4 product.

use core::arch::wasm32::*;

use super::dequantize::{look_up_u16, split_codes, u16_planes};
use super::vector::*;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec;

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

/// The 16x4 product.
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1, STRIDE>(matrix, activations, out);
    } else {
        gemv_groups::<2, { 2 * STRIDE }>(matrix, activations, out);
    }
}

/// Spans that share one look at the scales. No more than eight, so that decoding nested absmax hides behind the vector
/// work of the spans before.
pub(super) const STRIDE: usize = 8;

/// The 16x4 product with `GROUPS` activation groups in a span of 64 columns; `SCALES` is `GROUPS * STRIDE`.
fn gemv_groups<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    out: &mut [f32],
) {
    let planes = i16_planes();
    let (values, values_rest) = activations.values().as_chunks::<{ STRIDE * SPAN }>();
    let (scales, scales_rest) = activations.scales().as_chunks::<SCALES>();
    for (row, out) in out.iter_mut().enumerate() {
        let (packed, first_block) = matrix.aligned_row(row);
        let (packed, packed_rest) = packed.as_chunks::<{ STRIDE * SPAN / 2 }>();
        let mut lanes = [f32x4_splat(0.0); 2];
        for (stride, ((packed, values), scales)) in packed.iter().zip(values).zip(scales).enumerate() {
            let mut products = matrix.group_absmax::<SCALES>(first_block, stride * SCALES);
            for (product, scale) in products.iter_mut().zip(scales) {
                *product *= scale;
            }
            // Or else the compiler keeps the products in registers, from which a lane is spread by two instructions,
            // not one.
            let products = core::hint::black_box(products);
            lanes = add_spans::<GROUPS>(lanes, packed, values, &products, &planes);
        }
        if !scales_rest.is_empty() {
            let mut products = [0.0; SCALES];
            matrix.group_absmax_rest(first_block, scales.len() * SCALES, &mut products[..scales_rest.len()]);
            for (product, scale) in products.iter_mut().zip(scales_rest) {
                *product *= scale;
            }
            lanes = add_spans::<GROUPS>(lanes, packed_rest, values_rest, &products, &planes);
            if let (half, [.., values]) = (packed_rest.as_chunks::<{ SPAN / 2 }>().1, values_rest.as_chunks::<SPAN>().0)
                && !half.is_empty()
            {
                // The other half of the span has products of 0, which change no lane.
                let mut packed = [0; SPAN / 2];
                packed[..half.len()].copy_from_slice(half);
                lanes = add_spans::<GROUPS>(lanes, &packed, values, &[products[scales_rest.len() - 1], 0.0], &planes);
            }
        }
        *out = canonical(add_lanes(lanes) * spec::WEIGHT_STEP);
    }
}

/// Adds spans, as many as there are values for, to the lanes.
#[inline]
fn add_spans<const GROUPS: usize>(
    mut lanes: F32x8,
    packed: &[u8],
    values: &[i16],
    products: &[f32],
    planes: &[v128; 2],
) -> F32x8 {
    let spans = packed.as_chunks().0.iter().zip(values.as_chunks().0).zip(products.as_chunks::<GROUPS>().0);
    for ((packed, values), products) in spans {
        let [low, high] = span_sums(packed, values, planes);
        let sums = [f32x4_convert_i32x4(low), f32x4_convert_i32x4(high)];
        lanes = sum(lanes, product(sums, spread_products(products)));
    }
    lanes
}

/// The eight exact lane sums of a span; see the top of the module.
#[inline]
fn span_sums(packed: &[u8; SPAN / 2], values: &[i16; SPAN], planes: &[v128; 2]) -> [v128; 2] {
    add_products(decode_span(packed, planes), load_span(values))
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

/// The eight exact lane sums of the products of weights and activations; see the top of the module.
#[inline]
pub(super) fn add_products(w: [v128; 8], q: [v128; 8]) -> [v128; 2] {
    let dot = |i: usize| i32x4_dot_i16x8(w[i], q[i]);
    let half = |i: usize| i32x4_add(i32x4_add(dot(i), dot(i + 2)), i32x4_add(dot(i + 4), dot(i + 6)));
    [half(0), half(1)]
}

/// The product of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[inline]
pub(super) fn spread_products<const GROUPS: usize>(products: &[f32; GROUPS]) -> F32x8 {
    [f32x4_splat(products[0]), f32x4_splat(products[GROUPS - 1])]
}

/// The two bytes of each entry of the 16x4 codebook.
#[inline]
pub(super) fn i16_planes() -> [v128; 2] {
    let (book, _) = spec::CODEBOOK_I16.as_chunks();
    u16_planes([load_i16(&book[0]), load_i16(&book[1])])
}
