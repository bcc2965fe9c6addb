//! The 16x4 product.

use core::arch::x86_64::*;

use super::dequantize::{split_codes, u16_planes};
use super::vector::*;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::canonical;
use crate::matrix::Nf4Matrix;
use crate::spec;

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

/// The 16x4 product.
#[target_feature(enable = "avx2")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1, STRIDE>(matrix, activations, out);
    } else {
        gemv_groups::<2, { 2 * STRIDE }>(matrix, activations, out);
    }
}

/// Spans that share one look at the scales: the products of absmax and activation scale are made for all of them at once,
/// and stored, for a broadcast from memory is free and one from a register is not. No more than eight, so that decoding
/// nested absmax hides behind the vector work of the spans before.
pub(super) const STRIDE: usize = 8;

/// The 16x4 product with `GROUPS` activation groups in a span of 64 columns; `SCALES` is `GROUPS * STRIDE`.
#[target_feature(enable = "avx2")]
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
        let mut lanes = _mm256_setzero_ps();
        for (stride, ((packed, values), scales)) in packed.iter().zip(values).zip(scales).enumerate() {
            let mut products = matrix.group_absmax::<SCALES>(first_block, stride * SCALES);
            for (product, scale) in products.iter_mut().zip(scales) {
                *product *= scale;
            }
            // Or else the compiler keeps the products in a register and broadcasts from there.
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
#[target_feature(enable = "avx2")]
#[inline]
fn add_spans<const GROUPS: usize>(
    mut lanes: __m256,
    packed: &[u8],
    values: &[i16],
    products: &[f32],
    planes: &[__m256i; 2],
) -> __m256 {
    let spans = packed.as_chunks().0.iter().zip(values.as_chunks().0).zip(products.as_chunks::<GROUPS>().0);
    for ((packed, values), products) in spans {
        let sums = _mm256_cvtepi32_ps(span_sums(packed, values, planes));
        lanes = _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread_products(products)));
    }
    lanes
}

/// The eight exact lane sums of a span; see the top of the module.
#[target_feature(enable = "avx2")]
#[inline]
fn span_sums(packed: &[u8; SPAN / 2], values: &[i16; SPAN], planes: &[__m256i; 2]) -> __m256i {
    let (values, _) = values.as_chunks::<16>();
    let [a, b, c, d] = decode_span(packed, planes);
    let even = _mm256_add_epi32(_mm256_madd_epi16(a, load_i16(&values[0])), _mm256_madd_epi16(b, load_i16(&values[1])));
    let odd = _mm256_add_epi32(_mm256_madd_epi16(c, load_i16(&values[2])), _mm256_madd_epi16(d, load_i16(&values[3])));
    _mm256_add_epi32(even, odd)
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn decode_span(packed: &[u8; SPAN / 2], [low, high]: &[__m256i; 2]) -> [__m256i; 4] {
    let [(even_lo, even_hi), (odd_lo, odd_hi)] =
        split_codes(packed).map(|codes| (_mm256_shuffle_epi8(*low, codes), _mm256_shuffle_epi8(*high, codes)));
    [
        _mm256_unpacklo_epi8(even_lo, even_hi),
        _mm256_unpackhi_epi8(even_lo, even_hi),
        _mm256_unpacklo_epi8(odd_lo, odd_hi),
        _mm256_unpackhi_epi8(odd_lo, odd_hi),
    ]
}

/// The product of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread_products<const GROUPS: usize>(products: &[f32; GROUPS]) -> __m256 {
    if GROUPS == 1 {
        _mm256_set1_ps(products[0])
    } else {
        _mm256_set_m128(_mm_set1_ps(products[1]), _mm_set1_ps(products[0]))
    }
}

/// The two bytes of each entry of the 16x4 codebook, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn i16_planes() -> [__m256i; 2] {
    let book = load_i16(&spec::CODEBOOK_I16);
    u16_planes([_mm256_castsi256_si128(book), _mm256_extracti128_si256::<1>(book)])
}
