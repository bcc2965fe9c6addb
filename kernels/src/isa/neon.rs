//! aarch64 with NEON. Nothing is detected: this file is compiled only for targets that have it.
//!
//! The step of the 16x4 product, for 16 packed bytes (32 weights, half of the lanes); a span of 64 columns takes two:
//!
//! ```text
//! even = bytes >> 4                         codes of columns 0, 2, .. 30
//! odd  = bytes & 15                         codes of columns 1, 3, .. 31
//! for codes in [even, odd]:
//!     lo, hi = LOW[codes], HIGH[codes]      tbl: the two bytes of each 16-bit weight
//!     w0, w1 = zip(lo, hi)                  8 weights each: w0 bytes 0-7, w1 bytes 8-15
//!     a += w0[0..4] * q0[0..4] + w1[0..4] * q1[0..4]
//!     b += w0[4..8] * q0[4..8] + w1[4..8] * q1[4..8]
//! sums = addp(a, b)                         a0 + a1, a2 + a3, b0 + b1, b2 + b3
//! lanes += f32(sums) * (absmax * scale)
//! ```
//!
//! ```text
//!                 first 16 bytes                second 16 bytes
//!            a0 a1  a2 a3  b0 b1  b2 b3     a0 a1  a2 a3  b0 b1  b2 b3
//! w0 (even)   0  2 | 4  6 | 8 10 |12 14     32 34 |36 38 |40 42 |44 46
//! w1 (even)  16 18 |20 22 |24 26 |28 30     48 50 |52 54 |56 58 |60 62
//! lane         0      1      2      3         4      5      6      7
//! ```
//!
//! Integer sums are exact in any order, so neighbours are added once, at the end.
//!
//! The f32 paths look up the four bytes of each f32 and zip them twice: looking up whole f32 would take a `tbl` of four
//! registers, slow on many cores, for every four weights.
//!
//! A sum of products is two operations everywhere: the single rounding of `fmla` would give other bits.

use core::arch::aarch64::*;

use half::{bf16, f16};

use super::scalar;
use crate::activations::{ACTIVATION_MAX, Activations, SPAN};
use crate::format::{CODEBOOK, THRESHOLDS, absmax_from_bits, canonical, inverse_absmax};
use crate::kernels::Table;
use crate::matrix::Nf4Matrix;
use crate::{Isa, double_quant, spec};

pub(crate) static TABLE: Table = Table {
    isa: Isa::Neon,
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

/// Eight columns, or the eight lanes of a row.
type F32x8 = [float32x4_t; 2];

// ---------------------------------------------------------------------------------------------------------- quantize

macro_rules! quantize {
    ($name:ident, $element:ty, $load:ident) => {
        /// Codes and absmax of a tensor.
        #[target_feature(enable = "neon")]
        fn $name(weights: &[$element], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
            let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for ((block, packed), absmax) in blocks {
                if block.len() < block_size {
                    *absmax = scalar::quantize_partial_block(block, packed);
                    continue;
                }
                let mut largest = vdupq_n_u32(0);
                for x in block.as_chunks().0 {
                    largest = vmaxq_u32(largest, largest_bits($load(x)));
                }
                *absmax = absmax_from_bits(vmaxvq_u32(largest));
                let inverse = vdupq_n_f32(inverse_absmax(*absmax));
                for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
                    let (x, _) = x.as_chunks();
                    let codes = |i: usize| {
                        let [a, b] = $load(&x[i]);
                        [nearest_codes(vmulq_f32(a, inverse)), nearest_codes(vmulq_f32(b, inverse))]
                    };
                    store_128(packed, pack_codes([codes(0), codes(1), codes(2), codes(3)]));
                }
            }
        }
    };
}

quantize!(quantize_f32, f32, load_f32);
quantize!(quantize_f16, f16, load_f16);
quantize!(quantize_bf16, bf16, load_bf16);

/// For four scaled values the number of thresholds not below each (0 for NaN): 15 less the code, in each of the four
/// bytes. By binary search, in which each comparison gives the next bit as it is, for `sli` to append.
#[target_feature(enable = "neon")]
#[inline]
fn nearest_codes(x: float32x4_t) -> uint8x16_t {
    const T: [f32; 15] = THRESHOLDS;
    const FOURTHS: [f32; 4] = [T[13], T[9], T[5], T[1]];
    const EIGHTHS: [f32; 8] = [T[14], T[12], T[10], T[8], T[6], T[4], T[2], T[0]];
    let at_most = |t| vreinterpretq_u8_u32(vcleq_f32(x, t));
    let append = |code, bit| vsliq_n_u8::<1>(bit, code);
    // The bytes of entry `code` in a table of f32 are `4 * code + [0, 1, 2, 3]`.
    let entry = |code| vsliq_n_u8::<2>(vreinterpretq_u8_u32(vdupq_n_u32(0x0302_0100)), code);
    let fourths = vreinterpretq_u8_f32(load_f32x4(&FOURTHS));
    let [low, high] = load_f32(&EIGHTHS).map(|t| vreinterpretq_u8_f32(t));
    let half = vcleq_f32(x, vdupq_n_f32(T[7]));
    let quarter = at_most(vbslq_f32(half, vdupq_n_f32(T[3]), vdupq_n_f32(T[11])));
    let code = append(vshrq_n_u8::<7>(vreinterpretq_u8_u32(half)), quarter);
    let code = append(code, at_most(vreinterpretq_f32_u8(vqtbl1q_u8(fourths, entry(code)))));
    append(code, at_most(vreinterpretq_f32_u8(vqtbl2q_u8(uint8x16x2_t(low, high), entry(code)))))
}

/// The complements of 4 x 8 codes, in four bytes each, to the 16 bytes of the codes.
#[target_feature(enable = "neon")]
#[inline]
fn pack_codes(codes: [[uint8x16_t; 2]; 4]) -> uint8x16_t {
    let [a, b, c, d] = codes.map(|[x, y]| vuzp1q_u8(x, y));
    let (first, second) = (vuzp1q_u8(a, b), vuzp1q_u8(c, d));
    vmvnq_u8(vsliq_n_u8::<4>(vuzp2q_u8(first, second), vuzp1q_u8(first, second)))
}

// -------------------------------------------------------------------------------------------------------- dequantize

/// The weights as f32.
#[target_feature(enable = "neon")]
fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    let planes = f32_planes();
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let absmax = [vdupq_n_f32(segment.absmax); 2];
                for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                    for (codes, out) in codes_in_order(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
                        let [a, b, c, d] = look_up_f32(codes, &planes);
                        let (out, _) = out.as_chunks_mut();
                        store_f32(&mut out[0], product([a, b], absmax));
                        store_f32(&mut out[1], product([c, d], absmax));
                    }
                }
            }
            _ => scalar::dequantize_segment(matrix, &segment, out),
        }
    }
}

macro_rules! dequantize_half {
    ($name:ident, $element:ty, $round:ident) => {
        /// The weights rounded to 16 bits: the sixteen products of a block are rounded once, then looked up as two
        /// bytes.
        #[target_feature(enable = "neon")]
        fn $name(matrix: &Nf4Matrix<'_>, out: &mut [$element]) {
            let (book, _) = CODEBOOK.as_chunks();
            let mut rest = out;
            for segment in matrix.all_segments() {
                let (out, after) = rest.split_at_mut(segment.len);
                rest = after;
                match segment.whole {
                    Some(packed) if segment.absmax.is_finite() => {
                        let absmax = [vdupq_n_f32(segment.absmax); 2];
                        let values = |i: usize| $round(product(load_f32(&book[i]), absmax));
                        let planes = u16_planes([values(0), values(1)]);
                        for (bytes, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut::<32>().0) {
                            for (codes, out) in codes_in_order(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
                                let [a, b] = look_up_u16(codes, &planes);
                                let (out, _) = out.as_chunks_mut();
                                store_u16(&mut out[0], a);
                                store_u16(&mut out[1], b);
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

/// The weights, without absmax, of 16 codes in order: their four bytes are looked up apart and zipped twice.
#[target_feature(enable = "neon")]
#[inline]
fn look_up_f32(codes: uint8x16_t, planes: &[uint8x16_t; 4]) -> [float32x4_t; 4] {
    let [b0, b1, b2, b3] = planes.map(|p| vqtbl1q_u8(p, codes));
    let ([low, high], [low_top, high_top]) = (zip_u8(b0, b1), zip_u8(b2, b3));
    [vzip1q_u16(low, low_top), vzip2q_u16(low, low_top), vzip1q_u16(high, high_top), vzip2q_u16(high, high_top)]
        .map(|w| vreinterpretq_f32_u16(w))
}

/// The values of 16 codes in order.
#[target_feature(enable = "neon")]
#[inline]
fn look_up_u16(codes: uint8x16_t, [low, high]: &[uint8x16_t; 2]) -> [uint16x8_t; 2] {
    zip_u8(vqtbl1q_u8(*low, codes), vqtbl1q_u8(*high, codes))
}

/// The 32 codes of 16 packed bytes, one a byte, in column order.
#[target_feature(enable = "neon")]
#[inline]
fn codes_in_order(bytes: &[u8; 16]) -> [uint8x16_t; 2] {
    let bytes = load_128(bytes);
    let (even, odd) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)));
    [vzip1q_u8(even, odd), vzip2q_u8(even, odd)]
}

/// Byte `p` of the f32 of all codes.
#[target_feature(enable = "neon")]
#[inline]
fn f32_planes() -> [uint8x16_t; 4] {
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
    [0, 1, 2, 3].map(|p| load_128(&PLANES[p]))
}

/// Low and high bytes of sixteen 16-bit values.
#[target_feature(enable = "neon")]
#[inline]
fn u16_planes(values: [uint16x8_t; 2]) -> [uint8x16_t; 2] {
    let [a, b] = values.map(|v| vreinterpretq_u8_u16(v));
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)]
}

// ------------------------------------------------------------------------------------------------------- activations

/// Activations for the 16x4 multiply, in the order of [`crate::activations::SLOTS`].
#[target_feature(enable = "neon")]
fn quantize_activations(inputs: &[f32], group: usize, values: &mut [i16], scales: &mut [f32]) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
            padded[..inputs.len()].copy_from_slice(inputs);
            &padded
        });
        let (vectors, _) = inputs.as_chunks::<8>();
        let mut q = [vdupq_n_s16(0); 8];
        let per_group = group / 8;
        for ((x, q), scale) in vectors.chunks(per_group).zip(q.chunks_mut(per_group)).zip(scales) {
            let mut largest = vdupq_n_u32(0);
            for x in x {
                largest = vmaxq_u32(largest, largest_bits(load_f32(x)));
            }
            let factor;
            (*scale, factor) = scalar::activation_scale(f32::from_bits(vmaxvq_u32(largest)));
            if factor > 0.0 {
                for (x, q) in x.iter().zip(q) {
                    let [a, b] = load_f32(x);
                    let [a, b] = [vcvtnq_s32_f32(vmulq_n_f32(a, factor)), vcvtnq_s32_f32(vmulq_n_f32(b, factor))];
                    *q = vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
                }
            }
        }
        let (out, _) = values.as_chunks_mut();
        // Columns 16i..16i+16 are bytes 8i..8i+8, which stand in the pieces 0, 2, 1, 3.
        for (i, piece) in [0, 2, 1, 3].into_iter().enumerate() {
            let (first, second) = (q[2 * i], q[2 * i + 1]);
            store_i16(&mut out[piece], vuzp1q_s16(first, second));
            store_i16(&mut out[piece + 4], vuzp2q_s16(first, second));
        }
    }
}

const _: () = assert!(ACTIVATION_MAX == 8191, "the sums below rely on it to fit in 32 bits");

// ---------------------------------------------------------------------------------------------------------- products

/// The 16x4 product.
#[target_feature(enable = "neon")]
fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.group() == SPAN {
        gemv_groups::<1, STRIDE>(matrix, activations, out);
    } else {
        gemv_groups::<2, { 2 * STRIDE }>(matrix, activations, out);
    }
}

/// Spans that share one look at the scales. No more than eight, so that decoding nested absmax hides behind the vector
/// work of the spans before.
const STRIDE: usize = 8;

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

/// The eight exact lane sums of a span; see the top of this file.
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
fn spread_products<const GROUPS: usize>(products: &[f32; GROUPS]) -> F32x8 {
    [products[0], products[GROUPS - 1]].map(|p| vdupq_n_f32(p))
}

/// The two bytes of each entry of the 16x4 codebook.
#[target_feature(enable = "neon")]
#[inline]
fn i16_planes() -> [uint8x16_t; 2] {
    let (book, _) = spec::CODEBOOK_I16.as_chunks();
    u16_planes([0, 1].map(|i| vreinterpretq_u16_s16(load_i16(&book[i]))))
}

/// The f32 product.
#[target_feature(enable = "neon")]
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
#[target_feature(enable = "neon")]
#[inline]
fn arrange_f32(inputs: &[f32], panel: &mut [f32]) {
    for (inputs, panel) in inputs.chunks(SPAN).zip(panel.as_chunks_mut::<SPAN>().0) {
        let mut padded = [0.0; SPAN];
        padded[..inputs.len()].copy_from_slice(inputs);
        let ((first, second), (even, odd)) = (padded.split_at(SPAN / 2), panel.split_at_mut(SPAN / 2));
        let places = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for ((a, b), (even, odd)) in first.as_chunks().0.iter().zip(second.as_chunks().0).zip(places) {
            let halves = [load_f32(a), load_f32(b)];
            store_f32(even, halves.map(|[x, y]| vuzp1q_f32(x, y)));
            store_f32(odd, halves.map(|[x, y]| vuzp2q_f32(x, y)));
        }
    }
}

/// Adds the product of panel `p` of a row-aligned matrix, `cols` columns, with `GROUPS` blocks in a span of 64 columns
/// at most; `SCALES` is `GROUPS * STRIDE`.
#[target_feature(enable = "neon")]
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
        let mut lanes = [vdupq_n_f32(0.0); 2];
        let mut group = first_group;
        for (packed, inputs) in packed.iter().zip(inputs) {
            let absmax = matrix.group_absmax::<SCALES>(first_block, group);
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
#[target_feature(enable = "neon")]
#[inline]
fn add_spans_f32<const GROUPS: usize>(
    mut lanes: F32x8,
    packed: &[u8],
    inputs: &[f32],
    absmax: &[f32],
    planes: &[uint8x16_t; 4],
) -> F32x8 {
    let spans = packed.as_chunks::<{ SPAN / 2 }>().0.iter().zip(inputs.as_chunks::<SPAN>().0);
    for ((packed, x), absmax) in spans.zip(absmax.as_chunks::<GROUPS>().0) {
        let (halves, (x, _)) = (packed.as_chunks().0, x.as_chunks());
        let bytes = [load_128(&halves[0]), load_128(&halves[1])];
        let even = dot_32(bytes.map(|b| vshrq_n_u8::<4>(b)), &x[0], planes);
        let odd = dot_32(bytes.map(|b| vandq_u8(b, vdupq_n_u8(15))), &x[1], planes);
        lanes = sum(lanes, product(sum(even, odd), spread_products(absmax)));
    }
    lanes
}

/// Lane sums of the products of 32 codes.
#[target_feature(enable = "neon")]
#[inline]
fn dot_32(codes: [uint8x16_t; 2], x: &[f32; 32], planes: &[uint8x16_t; 4]) -> F32x8 {
    let [first, second] = [look_up_f32(codes[0], planes), look_up_f32(codes[1], planes)];
    let (x, _) = x.as_chunks();
    let place = |i: usize| product([first[i], second[i]], load_f32(&x[i]));
    sum(sum(place(0), place(1)), sum(place(2), place(3)))
}

/// `out = A x`, or `out += factor * A x`, for a dense row-major `a`; four rows at a time, which share the loads of `x`
/// and hide the latency of the additions.
#[target_feature(enable = "neon")]
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

#[target_feature(enable = "neon")]
#[inline]
fn dense_rows<const ROWS: usize>(a: &[f32], x: &[f32], add: Option<f32>, out: &mut [f32; ROWS]) {
    let mut lanes = [[vdupq_n_f32(0.0); 2]; ROWS];
    let (vectors, x_rest) = x.as_chunks::<8>();
    let mut rows = a.chunks_exact(x.len());
    let rows: [_; ROWS] = core::array::from_fn(|_| rows.next().unwrap_or_default().as_chunks::<8>());
    for (i, x) in vectors.iter().enumerate() {
        let x = load_f32(x);
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            *lanes = sum(*lanes, product(load_f32(&row.0[i]), x));
        }
    }
    for ((out, lanes), (_, a_rest)) in out.iter_mut().zip(&mut lanes).zip(rows) {
        if !x_rest.is_empty() {
            // Zeros in the lanes without an element add 0, which changes none.
            *lanes = sum(*lanes, product(load_padded(a_rest), load_padded(x_rest)));
        }
        scalar::store_dense(out, add_lanes(*lanes), add);
    }
}

// ----------------------------------------------------------------------------------------------------------- helpers

/// [`spec::add_lanes`] of the lanes of two registers.
#[target_feature(enable = "neon")]
#[inline]
fn add_lanes([low, high]: F32x8) -> f32 {
    let four = vaddq_f32(low, high);
    vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
}

#[target_feature(enable = "neon")]
#[inline]
fn sum(a: F32x8, b: F32x8) -> F32x8 {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])]
}

#[target_feature(enable = "neon")]
#[inline]
fn product(a: F32x8, b: F32x8) -> F32x8 {
    [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])]
}

/// Bits of the absolute values.
#[target_feature(enable = "neon")]
#[inline]
fn abs_bits(x: float32x4_t) -> uint32x4_t {
    vreinterpretq_u32_f32(vabsq_f32(x))
}

/// The larger of the absolute values in lanes `i` and `i + 4`, as bits.
#[target_feature(enable = "neon")]
#[inline]
fn largest_bits([low, high]: F32x8) -> uint32x4_t {
    vmaxq_u32(abs_bits(low), abs_bits(high))
}

/// Low and high bytes to 16-bit integers, in order.
#[target_feature(enable = "neon")]
#[inline]
fn zip_u8(low: uint8x16_t, high: uint8x16_t) -> [uint16x8_t; 2] {
    [vzip1q_u8(low, high), vzip2q_u8(low, high)].map(|x| vreinterpretq_u16_u8(x))
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: the intrinsic for it came with Rust 1.94, after
/// the oldest Rust that this crate supports.
#[target_feature(enable = "neon")]
#[inline]
fn round_f16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = abs_bits(x);
        let sign = vshrq_n_u32::<16>(vbicq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fff_ffff)));
        // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go; it takes the carry.
        let odd = vandq_u32(vshrq_n_u32::<13>(bits), vdupq_n_u32(1));
        let bias = vdupq_n_u32(0xfff_u32.wrapping_sub((127 - 15) << 23));
        let normal = vshrq_n_u32::<13>(vaddq_u32(vaddq_u32(bits, bias), odd));
        // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
        let half = vdupq_n_f32(0.5);
        let sum = vaddq_f32(vreinterpretq_f32_u32(bits), half);
        let subnormal = vsubq_u32(vreinterpretq_u32_f32(sum), vreinterpretq_u32_f32(half));
        let is_subnormal = vcltq_u32(bits, vdupq_n_u32(113 << 23));
        // From 2^16 on the exponent would run past infinity.
        let finite = vminq_u32(normal, vdupq_n_u32(0x7c00));
        vorrq_u32(vbslq_u32(is_subnormal, subnormal, finite), sign)
    };
    narrow_u16([rounded(x[0]), rounded(x[1])])
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[target_feature(enable = "neon")]
#[inline]
fn round_bf16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        vreinterpretq_u16_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd))
    };
    // The upper halves.
    vuzp2q_u16(rounded(x[0]), rounded(x[1]))
}

/// Eight 32-bit integers below 2^16 as 16-bit integers.
#[target_feature(enable = "neon")]
#[inline]
fn narrow_u16(x: [uint32x4_t; 2]) -> uint16x8_t {
    let [low, high] = x.map(|x| vreinterpretq_u16_u32(x));
    vuzp1q_u16(low, high)
}

#[target_feature(enable = "neon")]
#[inline]
fn load_bf16(x: &[bf16; 8]) -> F32x8 {
    shift_to_top(load_u16(x))
}

/// f16 to f32, exact, NaN and subnormals included: the exponent is moved by a product with 2^112.
#[target_feature(enable = "neon")]
#[inline]
fn load_f16(x: &[f16; 8]) -> F32x8 {
    let bits = load_u16(x);
    let magnitude = vandq_u16(bits, vdupq_n_u16(0x7fff));
    let special = vandq_u16(vcgtq_u16(magnitude, vdupq_n_u16(0x7bff)), vdupq_n_u16(0x7f80));
    let top = shift_to_top(vorrq_u16(veorq_u16(bits, magnitude), special));
    let join = |magnitude: uint32x4_t, top: float32x4_t| {
        let scaled = vmulq_n_f32(vreinterpretq_f32_u32(magnitude), f32::from_bits((127 + 112) << 23));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), vreinterpretq_u32_f32(top)))
    };
    let low = vshll_n_u16::<13>(vget_low_u16(magnitude));
    [join(low, top[0]), join(vshll_high_n_u16::<13>(magnitude), top[1])]
}

/// Eight f32 whose upper 16 bits are given, the others 0.
#[target_feature(enable = "neon")]
#[inline]
fn shift_to_top(x: uint16x8_t) -> F32x8 {
    [vshll_n_u16::<16>(vget_low_u16(x)), vshll_high_n_u16::<16>(x)].map(|x| vreinterpretq_f32_u32(x))
}

/// Up to eight f32, and zeros.
#[target_feature(enable = "neon")]
#[inline]
fn load_padded(x: &[f32]) -> F32x8 {
    let mut padded = [0.0; 8];
    padded[..x.len()].copy_from_slice(x);
    load_f32(&padded)
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f32(x: &[f32; 8]) -> F32x8 {
    let (x, _) = x.as_chunks();
    [load_f32x4(&x[0]), load_f32x4(&x[1])]
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f32x4(x: &[f32; 4]) -> float32x4_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_i16(x: &[i16; 8]) -> int16x8_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_s16(x.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_128(x: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads.
    unsafe { vld1q_u8(x.as_ptr()) }
}

/// Eight 16-bit values of any type.
#[target_feature(enable = "neon")]
#[inline]
fn load_u16<T: Half>(x: &[T; 8]) -> uint16x8_t {
    // SAFETY: the array has the 16 bytes that an unaligned load reads, for `Half` types have two.
    unsafe { vld1q_u16(x.as_ptr().cast()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_f32(out: &mut [f32; 8], x: F32x8) {
    for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
        // SAFETY: the array has the 16 bytes that an unaligned store writes.
        unsafe { vst1q_f32(out.as_mut_ptr(), x) }
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_i16(out: &mut [i16; 8], x: int16x8_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { vst1q_s16(out.as_mut_ptr(), x) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_u16<T: Half>(out: &mut [T; 8], x: uint16x8_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes, for `Half` types have two and take any bits.
    unsafe { vst1q_u16(out.as_mut_ptr().cast(), x) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_128(out: &mut [u8; 16], x: uint8x16_t) {
    // SAFETY: the array has the 16 bytes that an unaligned store writes.
    unsafe { vst1q_u8(out.as_mut_ptr(), x) }
}

/// The two types of 16 bits that any bit pattern is a value of.
trait Half {}
impl Half for f16 {}
impl Half for bf16 {}
const _: () = assert!(size_of::<f16>() == 2 && size_of::<bf16>() == 2);
