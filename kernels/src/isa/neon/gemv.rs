//! The 16x4 product.

use core::arch::aarch64::*;

use super::dequantize::{look_up_u16, split_codes, u16_planes};
use super::vector::*;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec;

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

/// The 16x4 product.
#[target_feature(enable = "neon")]
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
#[target_feature(enable = "neon")]
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
        let mut lanes = [vdupq_n_f32(0.0); 2];
        for (stride, ((packed, values), scales)) in packed.iter().zip(values).zip(scales).enumerate() {
            let mut products = matrix.group_absmax::<SCALES>(first_block, stride * SCALES);
            for (product, scale) in products.iter_mut().zip(scales) {
                *product *= scale;
            }
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
#[target_feature(enable = "neon")]
#[inline]
fn add_spans<const GROUPS: usize>(
    mut lanes: F32x8,
    packed: &[u8],
    values: &[i16],
    products: &[f32],
    planes: &[uint8x16_t; 2],
) -> F32x8 {
    let spans = packed.as_chunks().0.iter().zip(values.as_chunks().0).zip(products.as_chunks::<GROUPS>().0);
    for ((packed, values), products) in spans {
        let [low, high] = span_sums(packed, values, planes);
        let sums = [vcvtq_f32_s32(low), vcvtq_f32_s32(high)];
        lanes = sum(lanes, product(sums, spread_products(products)));
    }
    lanes
}

/// The eight exact lane sums of a span; see the top of the module.
#[target_feature(enable = "neon")]
#[inline]
fn span_sums(packed: &[u8; SPAN / 2], values: &[i16; SPAN], planes: &[uint8x16_t; 2]) -> [int32x4_t; 2] {
    add_products(decode_span(packed, planes), load_span(values))
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn decode_span(packed: &[u8; SPAN / 2], planes: &[uint8x16_t; 2]) -> [int16x8_t; 8] {
    let mut weights = [vdupq_n_s16(0); 8];
    for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
        for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
            let [first, second] = look_up_u16(codes, planes);
            weights[4 * odd + half] = vreinterpretq_s16_u16(first);
            weights[4 * odd + half + 2] = vreinterpretq_s16_u16(second);
        }
    }
    weights
}

/// 64 weights or activations.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_span(values: &[i16; SPAN]) -> [int16x8_t; 8] {
    let mut out = [vdupq_n_s16(0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_i16(values);
    }
    out
}

/// The eight exact lane sums of the products of weights and activations; see the top of the module.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_products(w: [int16x8_t; 8], q: [int16x8_t; 8]) -> [int32x4_t; 2] {
    let mut sums = [vdupq_n_s32(0); 2];
    for (half, sums) in sums.iter_mut().enumerate() {
        let (mut a, mut b) = (*sums, *sums);
        for i in [half, half + 2, half + 4, half + 6] {
            a = vmlal_s16(a, vget_low_s16(w[i]), vget_low_s16(q[i]));
            b = vmlal_high_s16(b, w[i], q[i]);
        }
        *sums = vpaddq_s32(a, b);
    }
    sums
}

/// The product of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn spread_products<const GROUPS: usize>(products: &[f32; GROUPS]) -> F32x8 {
    [products[0], products[GROUPS - 1]].map(|p| vdupq_n_f32(p))
}

/// The two bytes of each entry of the 16x4 codebook.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn i16_planes() -> [uint8x16_t; 2] {
    let (book, _) = spec::CODEBOOK_I16.as_chunks();
    u16_planes([0, 1].map(|i| vreinterpretq_u16_s16(load_i16(&book[i]))))
}
