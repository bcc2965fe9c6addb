//! The 16x4 product.

use core::arch::x86_64::*;

use super::dequantize::{split_codes, u16_planes};
use super::vector::*;
use crate::absmax::Absmax;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::{NESTED_BLOCK, canonical};
use crate::matrix::Nf4Matrix;
use crate::spec;

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

/// The 16x4 product.
#[target_feature(enable = "avx2")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1>(matrix, activations, out);
    } else {
        gemv_groups::<2>(matrix, activations, out);
    }
}

/// The 16x4 product with `GROUPS` activation groups in a span of 64 columns.
#[target_feature(enable = "avx2")]
fn gemv_groups<const GROUPS: usize>(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    let (values, scales) = (activations.values(), activations.scales());
    let zero = _mm256_setzero_ps();
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
            // What the codes stand for, in one nested block after the other: a broadcast from memory is free.
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
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn result(lanes: __m256) -> f32 {
    canonical(add_lanes(lanes) * spec::WEIGHT_STEP)
}

/// Adds consecutive columns of a row to the lanes: whole groups, as many as there are scales. `absmax` gives the one of each.
#[target_feature(enable = "avx2")]
#[inline]
fn add_columns<const GROUPS: usize>(
    mut lanes: __m256,
    packed: &[u8],
    values: &[i16],
    scales: &[f32],
    planes: &[__m256i; 2],
    absmax: impl Fn(usize) -> f32,
) -> __m256 {
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
#[target_feature(enable = "avx2")]
#[inline]
fn add_span<const GROUPS: usize>(
    lanes: __m256,
    packed: &[u8; SPAN / 2],
    values: &[i16; SPAN],
    absmax: &[f32; GROUPS],
    scales: &[f32; GROUPS],
    planes: &[__m256i; 2],
) -> __m256 {
    let sums = _mm256_cvtepi32_ps(sums_of_span(decode_span(packed, planes), values));
    _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread_products(absmax, scales)))
}

/// The products of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[target_feature(enable = "avx2")]
#[inline]
fn spread_products<const GROUPS: usize>(absmax: &[f32; GROUPS], scales: &[f32; GROUPS]) -> __m256 {
    if GROUPS == 1 {
        // Two broadcasts from memory, which are free, and a product. The compiler would rather multiply the scalars and
        // broadcast from a register, which takes one instruction more.
        _mm256_mul_ps(opaque(_mm256_set1_ps(absmax[0])), _mm256_set1_ps(scales[0]))
    } else {
        let pair = |x: &[f32; GROUPS]| _mm_set_ps(0.0, 0.0, x[1], x[0]);
        let products = _mm256_castps128_ps256(_mm_mul_ps(pair(absmax), pair(scales)));
        _mm256_permutevar8x32_ps(products, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0))
    }
}

/// The eight exact lane sums of the products of a span; see the top of the module.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sums_of_span([a, b, c, d]: [__m256i; 4], values: &[i16; SPAN]) -> __m256i {
    let (values, _) = values.as_chunks();
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

/// The two bytes of each entry of the 16x4 codebook, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn i16_planes() -> [__m256i; 2] {
    let book = load_i16(&spec::CODEBOOK_I16);
    u16_planes([_mm256_castsi256_si128(book), _mm256_extracti128_si256::<1>(book)])
}
