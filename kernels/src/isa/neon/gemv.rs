//! The 16x4 product.

use core::arch::aarch64::*;

use super::dequantize::{look_up_u16, u16_planes};
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

/// The eight exact lane sums of a span; see the top of `mod.rs`.
#[target_feature(enable = "neon")]
#[inline]
fn span_sums(bytes: &[u8; SPAN / 2], values: &[i16; SPAN], planes: &[uint8x16_t; 2]) -> [int32x4_t; 2] {
    let ((bytes, _), (q, _)) = (bytes.as_chunks(), values.as_chunks());
    [
        half_sums(&bytes[0], [&q[0], &q[2], &q[4], &q[6]], planes),
        half_sums(&bytes[1], [&q[1], &q[3], &q[5], &q[7]], planes),
    ]
}

/// The four lane sums of half a span.
#[target_feature(enable = "neon")]
#[inline]
fn half_sums(bytes: &[u8; 16], q: [&[i16; 8]; 4], planes: &[uint8x16_t; 2]) -> int32x4_t {
    let bytes = load_128(bytes);
    let [w0, w1] = look_up_u16(vshrq_n_u8::<4>(bytes), planes);
    let [w2, w3] = look_up_u16(vandq_u8(bytes, vdupq_n_u8(15)), planes);
    let (mut a, mut b) = (vdupq_n_s32(0), vdupq_n_s32(0));
    for (w, q) in [w0, w1, w2, w3].into_iter().zip(q) {
        let (w, q) = (vreinterpretq_s16_u16(w), load_i16(q));
        a = vmlal_s16(a, vget_low_s16(w), vget_low_s16(q));
        b = vmlal_high_s16(b, w, q);
    }
    vpaddq_s32(a, b)
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
fn i16_planes() -> [uint8x16_t; 2] {
    let (book, _) = spec::CODEBOOK_I16.as_chunks();
    u16_planes([0, 1].map(|i| vreinterpretq_u16_s16(load_i16(&book[i]))))
}
