//! x86-64 with AVX2.
//!
//! The step of the 16x4 product, for 32 packed bytes (64 weights, two 128-bit halves):
//!
//! ```text
//! even = bytes >> 4 & 15                    codes of columns 0, 2, .. 62
//! odd  = bytes & 15                         codes of columns 1, 3, .. 63
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      vpshufb: the two bytes of each 16-bit weight
//!     w0, w1 = unpack(lo, hi)               8 weights a half: w0 bytes 0-7 and 16-23, w1 bytes 8-15 and 24-31
//!     sums += pmadd(w0, q) + pmadd(w1, q)   32-bit lane l: weights 2l, 2l+1 of its half
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!               half 0                         half 1
//! w0 (even)  0 2 | 4 6 | 8 10 | 12 14      32 34 | 36 38 | 40 42 | 44 46
//! w1 (even) 16 18|20 22|24 26 | 28 30      48 50 | 52 54 | 56 58 | 60 62
//! lane         0    1     2      3            4      5      6      7
//! ```
//!
//! The f32 paths first bring the codes into column order, then look up the four bytes of each f32 and unpack them twice:
//! two look-ups by `vpermps` and a blend take the same ports for half as many weights.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::scalar;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::{CODEBOOK, THRESHOLDS, absmax_from_bits, canonical, inverse_absmax};
use crate::kernels::Table;
use crate::matrix::Nf4Matrix;
use crate::{Isa, double_quant, spec};

cpufeatures::new!(avx2, "avx2");

pub(crate) fn is_supported() -> bool {
    avx2::get()
}

pub(crate) static TABLE: Table = Table {
    isa: Isa::Avx2,
    quantize_f32,
    quantize_f16,
    quantize_bf16,
    dequantize_f32,
    dequantize_f16,
    dequantize_bf16,
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    quantize_activations,
    gemv,
    gemv_f32,
    gemv_dense,
};

// ---------------------------------------------------------------------------------------------------------- quantize

macro_rules! quantize {
    ($name:ident, $element:ty, $load:ident) => {
        /// Codes and absmax of a tensor.
        #[target_feature(enable = "avx2")]
        fn $name(weights: &[$element], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
            let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for ((block, packed), absmax) in blocks {
                if block.len() < block_size {
                    *absmax = scalar::quantize_partial_block(block, packed);
                    continue;
                }
                let mut largest = _mm256_setzero_si256();
                for x in block.as_chunks().0 {
                    largest = _mm256_max_epu32(largest, abs_bits($load(x)));
                }
                *absmax = absmax_from_bits(largest_u32(largest));
                let inverse = _mm256_set1_ps(inverse_absmax(*absmax));
                for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
                    let (x, _) = x.as_chunks();
                    let codes = |i: usize| nearest_codes(_mm256_mul_ps($load(&x[i]), inverse));
                    store_128(packed, pack_codes([codes(0), codes(1), codes(2), codes(3)]));
                }
            }
        }
    };
}

quantize!(quantize_f32, f32, load_f32);
quantize!(quantize_f16, f16, load_f16);
quantize!(quantize_bf16, bf16, load_bf16);

/// For eight scaled values the number of thresholds strictly below each (15 for NaN), by binary search.
#[target_feature(enable = "avx2")]
#[inline]
fn nearest_codes(x: __m256) -> __m256i {
    const T: [f32; 15] = THRESHOLDS;
    const FOURTHS: [f32; 8] = [T[1], T[5], T[9], T[13], T[1], T[5], T[9], T[13]];
    const EIGHTHS: [f32; 8] = [T[0], T[2], T[4], T[6], T[8], T[10], T[12], T[14]];
    let above = |t: __m256| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLE_UQ>(x, t));
    // A mask is -1 where the value is above, so subtracting it counts.
    let twice_plus = |code: __m256i, mask: __m256i| _mm256_sub_epi32(_mm256_add_epi32(code, code), mask);
    let half = above(_mm256_set1_ps(T[7]));
    let quarter = above(_mm256_blendv_ps(_mm256_set1_ps(T[3]), _mm256_set1_ps(T[11]), _mm256_castsi256_ps(half)));
    let code = twice_plus(_mm256_srli_epi32::<31>(half), quarter);
    let code = twice_plus(code, above(_mm256_permutevar_ps(load_f32(&FOURTHS), code)));
    twice_plus(code, above(_mm256_permutevar8x32_ps(load_f32(&EIGHTHS), code)))
}

/// 4 x 8 codes in 32-bit lanes to 16 bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn pack_codes([a, b, c, d]: [__m256i; 4]) -> __m128i {
    let bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // The packs work in halves: 32-bit pieces a0 b0 c0 d0 | a1 b1 c1 d1.
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}

// -------------------------------------------------------------------------------------------------------- dequantize

/// The weights as f32.
#[target_feature(enable = "avx2")]
fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    let planes = f32_planes();
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let absmax = _mm256_set1_ps(segment.absmax);
                for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                    let weights = look_up_f32(codes_in_order::<4>(bytes), &planes);
                    for (w, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
                        store_f32(out, _mm256_mul_ps(w, absmax));
                    }
                }
            }
            _ => scalar::dequantize_segment(matrix, &segment, out),
        }
    }
}

macro_rules! dequantize_half {
    ($name:ident, $element:ty, $round:ident) => {
        /// The weights rounded to 16 bits: the sixteen products of a block are rounded once, then looked up as two bytes.
        #[target_feature(enable = "avx2")]
        fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let (book, _) = CODEBOOK.as_chunks();
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let absmax = _mm256_set1_ps(segment.absmax);
                        let values = [0, 1].map(|i| $round(_mm256_mul_ps(load_f32(&book[i]), absmax)));
                        let planes = u16_planes(values);
                        for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                            let weights = decode_u16(bytes, &planes);
                            for (w, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
                                store_u16(out, w);
                            }
                        }
                    }
                    _ => scalar::dequantize_segment(matrix, &segment, out),
                }
            }
        }
    };
}

dequantize_half!(dequantize_f16, f16, round_f16);
dequantize_half!(dequantize_bf16, bf16, round_bf16);

/// The weights, without absmax, of 32 codes. Codes `4i..4i+4` of each half become the 32-bit lanes of result `i`: their four
/// bytes are looked up apart and brought together by two levels of unpacking.
#[target_feature(enable = "avx2")]
#[inline]
fn look_up_f32(codes: __m256i, planes: &[__m256i; 4]) -> [__m256; 4] {
    let [b0, b1, b2, b3] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    let (low, high) = (_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1));
    let (low_top, high_top) = (_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3));
    [
        _mm256_unpacklo_epi16(low, low_top),
        _mm256_unpackhi_epi16(low, low_top),
        _mm256_unpacklo_epi16(high, high_top),
        _mm256_unpackhi_epi16(high, high_top),
    ]
    .map(|w| _mm256_castsi256_ps(w))
}

/// The 32 values of 16 packed bytes, in column order.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_u16(bytes: &[u8; 16], planes: &[__m256i; 2]) -> [__m256i; 2] {
    let codes = codes_in_order::<8>(bytes);
    let [b0, b1] = planes.map(|p| _mm256_shuffle_epi8(p, codes));
    [_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)]
}

/// The 32 codes of 16 packed bytes, one a byte. Runs of `RUN` codes (4 or 8) go to the two halves in turn, so that unpacking
/// what is looked up for them leaves whole registers in column order.
#[target_feature(enable = "avx2")]
#[inline]
fn codes_in_order<const RUN: usize>(bytes: &[u8; 16]) -> __m256i {
    let twice = const {
        let mut from = [0; 32];
        let mut i = 0;
        while i < 32 {
            let (half, place) = (i / 16, i % 16);
            let column = place / RUN * 2 * RUN + half * RUN + place % RUN;
            #[allow(clippy::cast_possible_truncation, reason = "column < 32")]
            {
                from[i] = (column / 2) as u8;
            }
            i += 1;
        }
        from
    };
    let twice = _mm256_shuffle_epi8(_mm256_set_m128i(load_128(bytes), load_128(bytes)), load_256(&twice));
    let even = _mm256_and_si256(_mm256_srli_epi16::<4>(twice), _mm256_set1_epi16(0x000f));
    _mm256_or_si256(even, _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00)))
}

/// Byte `p` of the f32 of all codes, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn f32_planes() -> [__m256i; 4] {
    const PLANES: [[u8; 16]; 4] = {
        let mut planes = [[0; 16]; 4];
        let mut k = 0;
        while k < 16 {
            let bytes = CODEBOOK[k].to_le_bytes();
            (planes[0][k], planes[1][k], planes[2][k], planes[3][k]) = (bytes[0], bytes[1], bytes[2], bytes[3]);
            k += 1;
        }
        planes
    };
    [0, 1, 2, 3].map(|p| _mm256_broadcastsi128_si256(load_128(&PLANES[p])))
}

/// Low and high bytes of sixteen 16-bit values, each in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn u16_planes([a, b]: [__m128i; 2]) -> [__m256i; 2] {
    let low = _mm_set1_epi16(0xff);
    let plane = |x, y| _mm256_broadcastsi128_si256(_mm_packus_epi16(x, y));
    [plane(_mm_and_si128(a, low), _mm_and_si128(b, low)), plane(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b))]
}

// ------------------------------------------------------------------------------------------------------- activations

/// Activations for the 16x4 multiply, in the order of [`crate::activations::SLOTS`].
#[target_feature(enable = "avx2")]
fn quantize_activations(inputs: &[f32], group: usize, values: &mut [i16], scales: &mut [f32]) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
            padded[..inputs.len()].copy_from_slice(inputs);
            &padded
        });
        let (vectors, _) = inputs.as_chunks::<8>();
        let mut q = [_mm256_setzero_si256(); 8];
        let per_group = group / 8;
        for ((x, q), scale) in vectors.chunks(per_group).zip(q.chunks_mut(per_group)).zip(scales) {
            let mut largest = _mm256_setzero_si256();
            for x in x {
                largest = _mm256_max_epu32(largest, abs_bits(load_f32(x)));
            }
            let factor;
            (*scale, factor) = scalar::activation_scale(f32::from_bits(largest_u32(largest)));
            if factor > 0.0 {
                let factor = _mm256_set1_ps(factor);
                for (x, q) in x.iter().zip(q) {
                    *q = _mm256_cvtps_epi32(_mm256_mul_ps(load_f32(x), factor));
                }
            }
        }
        // Columns 16i..16i+16: the eight even ones in the low half, the odd ones in the high half.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
            let columns = _mm256_packs_epi32(q[2 * i], q[2 * i + 1]);
            let apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            let apart = _mm256_shuffle_epi8(columns, _mm256_broadcastsi128_si256(apart));
            _mm256_permutevar8x32_epi32(apart, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
        });
        let (out, _) = values.as_chunks_mut();
        store_i16(&mut out[0], _mm256_permute2x128_si256::<0x20>(a, c));
        store_i16(&mut out[1], _mm256_permute2x128_si256::<0x20>(b, d));
        store_i16(&mut out[2], _mm256_permute2x128_si256::<0x31>(a, c));
        store_i16(&mut out[3], _mm256_permute2x128_si256::<0x31>(b, d));
    }
}

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

// ---------------------------------------------------------------------------------------------------------- products

/// The 16x4 product.
#[target_feature(enable = "avx2")]
fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1, STRIDE>(matrix, activations, out);
    } else {
        gemv_groups::<2, { 2 * STRIDE }>(matrix, activations, out);
    }
}

/// Spans that share one look at the scales: the products of absmax and activation scale are made for all of them at once,
/// and stored, for a broadcast from memory is free and one from a register is not. No more than eight, so that decoding
/// nested absmax hides behind the vector work of the spans before.
const STRIDE: usize = 8;

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

/// The eight exact lane sums of a span; see the top of this file.
#[target_feature(enable = "avx2")]
#[inline]
fn span_sums(bytes: &[u8; SPAN / 2], values: &[i16; SPAN], [low, high]: &[__m256i; 2]) -> __m256i {
    let bytes = load_256(bytes);
    let nibble = _mm256_set1_epi8(15);
    let (values, _) = values.as_chunks::<16>();
    let pair_sums = |codes: __m256i, v0: &[i16; 16], v1: &[i16; 16]| {
        let (lo, hi) = (_mm256_shuffle_epi8(*low, codes), _mm256_shuffle_epi8(*high, codes));
        let w0 = _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, hi), load_i16(v0));
        let w1 = _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, hi), load_i16(v1));
        _mm256_add_epi32(w0, w1)
    };
    let even = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
    let odd = _mm256_and_si256(bytes, nibble);
    _mm256_add_epi32(pair_sums(even, &values[0], &values[1]), pair_sums(odd, &values[2], &values[3]))
}

/// The product of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[target_feature(enable = "avx2")]
#[inline]
fn spread_products<const GROUPS: usize>(products: &[f32; GROUPS]) -> __m256 {
    if GROUPS == 1 {
        _mm256_set1_ps(products[0])
    } else {
        _mm256_set_m128(_mm_set1_ps(products[1]), _mm_set1_ps(products[0]))
    }
}

/// The two bytes of each entry of the 16x4 codebook, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn i16_planes() -> [__m256i; 2] {
    let book = load_i16(&spec::CODEBOOK_I16);
    u16_planes([_mm256_castsi256_si128(book), _mm256_extracti128_si256::<1>(book)])
}

/// The f32 product.
#[target_feature(enable = "avx2")]
fn gemv_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    if !matrix.is_row_aligned() {
        return scalar::gemv_f32(matrix, inputs, out);
    }
    out.fill(0.0);
    let mut panel = [0.0; spec::PANEL];
    for (p, inputs) in inputs.chunks(spec::PANEL).enumerate() {
        let panel = &mut panel[..inputs.len().next_multiple_of(SPAN)];
        arrange_f32(inputs, panel);
        if matrix.block_size().group() == SPAN {
            gemv_f32_panel::<1, STRIDE>(matrix, p, inputs.len(), panel, out);
        } else {
            gemv_f32_panel::<2, { 2 * STRIDE }>(matrix, p, inputs.len(), panel, out);
        }
    }
    out.iter_mut().for_each(|y| *y = canonical(*y));
}

/// Puts inputs into the order of [`spec::F32_SLOTS`], with zeros after the last.
#[target_feature(enable = "avx2")]
#[inline]
fn arrange_f32(inputs: &[f32], panel: &mut [f32]) {
    for (inputs, panel) in inputs.chunks(SPAN).zip(panel.as_chunks_mut::<SPAN>().0) {
        let mut padded = [0.0; SPAN];
        padded[..inputs.len()].copy_from_slice(inputs);
        let ((first, second), (even, odd)) = (padded.split_at(SPAN / 2), panel.split_at_mut(SPAN / 2));
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for ((a, b), (even, odd)) in first.as_chunks().0.iter().zip(second.as_chunks().0).zip(places) {
            let (a, b) = (load_f32(a), load_f32(b));
            let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            store_f32(even, _mm256_shuffle_ps::<0b10_00_10_00>(low, high));
            store_f32(odd, _mm256_shuffle_ps::<0b11_01_11_01>(low, high));
        }
    }
}

/// Adds the product of panel `p` of a row-aligned matrix, `cols` columns, with `GROUPS` blocks in a span of 64 columns at
/// most; `SCALES` is `GROUPS * STRIDE`.
#[target_feature(enable = "avx2")]
fn gemv_f32_panel<const GROUPS: usize, const SCALES: usize>(
    matrix: &Nf4Matrix<'_>,
    p: usize,
    cols: usize,
    inputs: &[f32],
    out: &mut [f32],
) {
    let planes = f32_planes();
    let first_group = p * (spec::PANEL / SPAN * GROUPS);
    let (inputs, inputs_rest) = inputs.as_chunks::<{ STRIDE * SPAN }>();
    for (row, out) in out.iter_mut().enumerate() {
        let (packed, first_block) = matrix.aligned_row(row);
        let (packed, packed_rest) = packed[p * spec::PANEL / 2..][..cols / 2].as_chunks::<{ STRIDE * SPAN / 2 }>();
        let mut lanes = _mm256_setzero_ps();
        let mut group = first_group;
        for (packed, inputs) in packed.iter().zip(inputs) {
            let absmax = core::hint::black_box(matrix.group_absmax::<SCALES>(first_block, group));
            lanes = add_spans_f32::<GROUPS>(lanes, packed, inputs, &absmax, &planes);
            group += SCALES;
        }
        if !packed_rest.is_empty() {
            let mut absmax = [0.0; SCALES];
            let groups = packed_rest.len() / (SPAN / 2 / GROUPS);
            matrix.group_absmax_rest(first_block, group, &mut absmax[..groups]);
            lanes = add_spans_f32::<GROUPS>(lanes, packed_rest, inputs_rest, &absmax, &planes);
            if let (half, [.., inputs]) = (packed_rest.as_chunks::<{ SPAN / 2 }>().1, inputs_rest.as_chunks::<SPAN>().0)
                && !half.is_empty()
            {
                // The other half of the span has inputs and an absmax of 0, which change no lane.
                let mut packed = [0; SPAN / 2];
                packed[..half.len()].copy_from_slice(half);
                lanes = add_spans_f32::<GROUPS>(lanes, &packed, inputs, &[absmax[groups - 1], 0.0], &planes);
            }
        }
        *out += add_lanes(lanes);
    }
}

/// Adds spans, as many as there are inputs for, to the lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_spans_f32<const GROUPS: usize>(
    mut lanes: __m256,
    packed: &[u8],
    inputs: &[f32],
    absmax: &[f32],
    planes: &[__m256i; 4],
) -> __m256 {
    let nibble = _mm256_set1_epi8(15);
    let spans = packed.as_chunks().0.iter().zip(inputs.as_chunks::<SPAN>().0).zip(absmax.as_chunks::<GROUPS>().0);
    for ((packed, x), absmax) in spans {
        let (bytes, (x, _)) = (load_256(packed), x.as_chunks());
        let even = dot_32(_mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble), &x[0], planes);
        let odd = dot_32(_mm256_and_si256(bytes, nibble), &x[1], planes);
        let sums = _mm256_add_ps(even, odd);
        lanes = _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread_products(absmax)));
    }
    lanes
}

/// Lane sums of the products of 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_32(codes: __m256i, x: &[f32; 32], planes: &[__m256i; 4]) -> __m256 {
    let [a, b, c, d] = look_up_f32(codes, planes);
    let (x, _) = x.as_chunks();
    let ab = _mm256_add_ps(_mm256_mul_ps(a, load_f32(&x[0])), _mm256_mul_ps(b, load_f32(&x[1])));
    let cd = _mm256_add_ps(_mm256_mul_ps(c, load_f32(&x[2])), _mm256_mul_ps(d, load_f32(&x[3])));
    _mm256_add_ps(ab, cd)
}

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`; four rows at a time, which share the loads of `x` and
/// hide the latency of the additions.
#[target_feature(enable = "avx2")]
fn gemv_dense(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32]) {
    let (fours, rest) = out.as_chunks_mut::<4>();
    let (a, a_rest) = a.split_at(fours.len() * 4 * x.len());
    for (a, out) in a.chunks_exact(4 * x.len()).zip(fours) {
        dense_rows(a, x, add, out);
    }
    for (a, out) in a_rest.chunks_exact(x.len()).zip(rest) {
        dense_rows(a, x, add, core::array::from_mut(out));
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn dense_rows<const ROWS: usize>(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32; ROWS]) {
    let mut lanes = [_mm256_setzero_ps(); ROWS];
    let (vectors, x_rest) = x.as_chunks::<8>();
    let mut rows = a.chunks_exact(x.len());
    let rows: [_; ROWS] = core::array::from_fn(|_| rows.next().unwrap_or_default().as_chunks::<8>());
    for (i, x) in vectors.iter().enumerate() {
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            *lanes = _mm256_add_ps(*lanes, _mm256_mul_ps(load_f32(&row.0[i]), load_f32(x)));
        }
    }
    for ((out, lanes), (_, a_rest)) in out.iter_mut().zip(&mut lanes).zip(rows) {
        if !x_rest.is_empty() {
            // Zeros in the lanes without an element add 0, which changes none.
            let product = _mm256_mul_ps(load_padded(a_rest), load_padded(x_rest));
            *lanes = _mm256_add_ps(*lanes, product);
        }
        scalar::store_dense(out, add_lanes(*lanes), add);
    }
}

// ----------------------------------------------------------------------------------------------------------- helpers

/// [`spec::add_lanes`] of the lanes of a register.
#[target_feature(enable = "avx2")]
#[inline]
fn add_lanes(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Bits of the absolute values.
#[target_feature(enable = "avx2")]
#[inline]
fn abs_bits(x: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff))
}

/// The largest of eight unsigned integers.
#[target_feature(enable = "avx2")]
#[inline]
fn largest_u32(x: __m256i) -> u32 {
    let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b0100_1110>(x));
    let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b1011_0001>(x));
    _mm_cvtsi128_si32(x).cast_unsigned()
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: F16C is a feature of its own.
#[target_feature(enable = "avx2")]
#[inline]
fn round_f16(x: __m256) -> __m128i {
    let bits = abs_bits(x);
    let sign = _mm256_srli_epi32::<16>(_mm256_andnot_si256(_mm256_set1_epi32(0x7fff_ffff), _mm256_castps_si256(x)));
    // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go, a carry running into the exponent.
    let odd = _mm256_and_si256(_mm256_srli_epi32::<13>(bits), _mm256_set1_epi32(1));
    let bias = _mm256_set1_epi32((15 - 127) * (1 << 23) + 0xfff);
    let normal = _mm256_srli_epi32::<13>(_mm256_add_epi32(_mm256_add_epi32(bits, bias), odd));
    // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
    let half = _mm256_set1_ps(0.5);
    let sum = _mm256_add_ps(_mm256_castsi256_ps(bits), half);
    let subnormal = _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_castps_si256(half));
    let is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(113 << 23), bits);
    // From 2^16 on the exponent would run past infinity.
    let finite = _mm256_min_epi32(normal, _mm256_set1_epi32(0x7c00));
    let magnitude = _mm256_blendv_epi8(finite, subnormal, is_subnormal);
    narrow_u16(_mm256_or_si256(magnitude, sign))
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[target_feature(enable = "avx2")]
#[inline]
fn round_bf16(x: __m256) -> __m128i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    narrow_u16(_mm256_srli_epi32::<16>(rounded))
}

/// Eight 32-bit integers below 2^16 as 16-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow_u16(x: __m256i) -> __m128i {
    _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x))
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_bf16(x: &[bf16; 8]) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(widen_u16(x)))
}

/// f16 to f32, exact, NaN and subnormals included: the exponent is moved by a product with 2^112.
#[target_feature(enable = "avx2")]
#[inline]
fn load_f16(x: &[f16; 8]) -> __m256 {
    let bits = widen_u16(x);
    let magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fff));
    let sign = _mm256_slli_epi32::<16>(_mm256_xor_si256(bits, magnitude));
    let scaled = _mm256_mul_ps(
        _mm256_castsi256_ps(_mm256_slli_epi32::<13>(magnitude)),
        _mm256_set1_ps(f32::from_bits((127 + 112) << 23)),
    );
    let special = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7bff));
    let special = _mm256_and_si256(special, _mm256_set1_epi32(0x7f80_0000));
    _mm256_or_ps(scaled, _mm256_castsi256_ps(_mm256_or_si256(special, sign)))
}

/// Up to eight f32, and zeros.
#[target_feature(enable = "avx2")]
#[inline]
fn load_padded(x: &[f32]) -> __m256 {
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    load_f32(&padded)
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_f32(x: &[f32; 8]) -> __m256 {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_i16(x: &[i16; 16]) -> __m256i {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_256(x: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that an unaligned load reads.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_128(x: &[u8; 16]) -> __m128i {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

/// Eight 16-bit values of any type, as 32-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
fn widen_u16<T: Half>(x: &[T; 8]) -> __m256i {
    // SAFETY: the array has the 16 bytes that an unaligned load reads, for `Half` types have two.
    _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_f32(out: &mut [f32; 8], x: __m256) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_i16(out: &mut [i16; 16], x: __m256i) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_u16<T: Half>(out: &mut [T; 16], x: __m256i) {
    // SAFETY: the array has the 32 bytes that an unaligned store writes, for `Half` types have two and take any bits.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_128(out: &mut [u8; 16], x: __m128i) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), x) }
}

/// The two types of 16 bits that any bit pattern is a value of.
trait Half {}
impl Half for f16 {}
impl Half for bf16 {}
const _: () = assert!(size_of::<f16>() == 2 && size_of::<bf16>() == 2);
