//! Double quantization: the absmax vector, quantized to 8 bits in blocks of 256.
//!
//! This is portable code that all instruction sets share. It handles one value per block, so it costs little compared to
//! the rest, and it must reproduce steps of `bitsandbytes` and `PyTorch` (a cascaded sum, a look-up grid) from which vector
//! units would gain nothing.

use crate::format::{NESTED_BLOCK, absmax_from_bits, canonical};

/// The quant map for absmax: the signed dynamic map of `bitsandbytes` (`create_dynamic_map()`), 256 sorted values.
///
/// It has seven decades, of which decade `10^(i-6)`, `i` in 0..7, holds `2^i` values of each sign, and the values 0 and 1.
/// The table is stored, not computed, because `PyTorch` makes the points with fused multiply-adds on some machines and
/// without them on others, and 42 entries depend on that. These are the entries with fused multiply-adds, as in published
/// checkpoints. Reading always uses the map in the file.
#[doc(alias("create_dynamic_map", "nested_quant_map"))]
pub static DYNAMIC_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    let mut k = 0;
    while k < 256 {
        map[k] = f32::from_bits(DYNAMIC_MAP_BITS[k]);
        k += 1;
    }
    map
};

/// Midpoints between neighbouring values of the dynamic map.
static MIDPOINTS: [f32; 255] = {
    let mut mid = [0.0; 255];
    let mut k = 0;
    while k < 255 {
        mid[k] = 0.5 * (f32::from_bits(DYNAMIC_MAP_BITS[k]) + f32::from_bits(DYNAMIC_MAP_BITS[k + 1]));
        k += 1;
    }
    mid
};

/// Quantizes `absmax - offset` in blocks of [`NESTED_BLOCK`]: one code per value, one scale per block.
///
/// A block that contains NaN or infinity gets the scale NaN and the codes 0.
pub(crate) fn quantize_absmax(absmax: &[f32], offset: f32, codes: &mut [u8], nested_absmax: &mut [f32]) {
    let blocks = absmax.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK)).zip(nested_absmax);
    for ((values, codes), scale) in blocks {
        let bits = values.iter().map(|v| (v - offset).to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        *scale = absmax_from_bits(bits);
        if !scale.is_finite() {
            *scale = f32::NAN;
        }
        if *scale > 0.0 {
            let inverse = 1.0 / *scale;
            for (code, v) in codes.iter_mut().zip(values) {
                *code = nested_code((v - offset) * inverse);
            }
        } else {
            codes.fill(0);
        }
    }
}

/// The 8-bit code of a scaled value.
///
/// `bitsandbytes` on the CPU does not round to the nearest entry: it looks the value up on a grid of 65,536 points in
/// `[-1, 1]`, whose codes are the number of midpoints strictly below the point. It has the grid as a table of 64 KB; a
/// search among the midpoints gives the same codes and suits small machines.
#[inline]
fn nested_code(scaled: f32) -> u8 {
    // `1/scale` overflows for a subnormal scale, and 0 * infinity is NaN; the first point of the grid gives bad input the
    // code 0.
    let t = if scaled.is_nan() { -1.0 } else { scaled.clamp(-1.0, 1.0) };
    #[allow(
        clippy::cast_possible_truncation,
        reason = "truncation is the rule; t is in [-1, 1], so this is in 0..=65535"
    )]
    let point = ((t + 1.0) * 0.5 * 65535.0 + 0.5) as i32;
    #[allow(clippy::cast_precision_loss, reason = "at most 65535, exact in f32")]
    let at = -1.0 + 2.0 * point as f32 / 65535.0;
    let mut below = 0;
    let mut step = 128;
    // A binary search without branches, half of which would be mispredicted.
    while step > 0 {
        below += if MIDPOINTS[below + step - 1] < at { step } else { 0 };
        step /= 2;
    }
    #[allow(clippy::cast_possible_truncation, reason = "at most 255, the sum of the steps")]
    {
        below as u8
    }
}

/// Accumulators and levels of `PyTorch`'s cascaded float sum, and the lanes of its vectors (AVX2: eight f32).
const ACCUMULATORS: usize = 4;
const LEVELS: usize = 4;
const LANES: usize = 8;

/// The f32 mean as `PyTorch` computes it for a contiguous vector on one thread, bit for bit; `bitsandbytes` stores it as
/// the offset of double quantization. (With 32,768 values or more, `PyTorch` may split the sum over threads; this does
/// not.)
///
/// Source: `aten/src/ATen/native/cpu/SumKernel.cpp` (`cascade_sum`). Vectors of 8 lanes are summed by [`cascade`]. The
/// values beyond a multiple of 8 are summed from 0 in order, and the lanes are added to that sum in order. Fewer than 8
/// values are treated as vectors of one lane. The mean of no values is NaN.
pub(crate) fn mean(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let sum = if vectors.is_empty() {
        let [lane] = cascade(rest.as_chunks::<1>().0);
        0.0 + lane
    } else {
        let rest = rest.iter().fold(0.0, |s, v| s + v);
        cascade(vectors).into_iter().fold(rest, |s, lane| s + lane)
    };
    #[allow(clippy::cast_precision_loss, reason = "PyTorch divides by the count as f32")]
    let count = values.len() as f32;
    canonical(sum / count)
}

/// Sums vectors of `W` lanes: vector `v` goes to accumulator `v % 4`. Each accumulator is a cascade of four levels, each of
/// which is emptied into the next after `2^max(4, ceil(log2(additions)) / 4)` additions. At the end, the levels are added
/// in order, then the vectors beyond a multiple of four, then accumulators 1, 2, 3.
fn cascade<const W: usize>(vectors: &[[f32; W]]) -> [f32; W] {
    let (rows, rest) = vectors.as_chunks::<ACCUMULATORS>();
    let log2 = if rows.len() <= 2 { 1 } else { usize::BITS - (rows.len() - 1).leading_zeros() };
    let power = (log2 / 4).max(4);
    let mask = (1 << power) - 1;
    let mut levels = [[[0.0; W]; ACCUMULATORS]; LEVELS];
    for (done, row) in (1_usize..).zip(rows) {
        add_row(&mut levels[0], row);
        // A level is full when the bits of the count that belong to it are zero.
        let mut counted = done;
        for level in 1..LEVELS {
            if counted & mask != 0 {
                break;
            }
            counted >>= power;
            let full = core::mem::replace(&mut levels[level - 1], [[0.0; W]; ACCUMULATORS]);
            add_row(&mut levels[level], &full);
        }
    }
    let [mut sum, upper @ ..] = levels;
    for level in &upper {
        add_row(&mut sum, level);
    }
    let [mut total, others @ ..] = sum;
    for vector in rest.iter().chain(&others) {
        add(&mut total, vector);
    }
    total
}

fn add_row<const W: usize>(sum: &mut [[f32; W]; ACCUMULATORS], row: &[[f32; W]; ACCUMULATORS]) {
    for (s, v) in sum.iter_mut().zip(row) {
        add(s, v);
    }
}

fn add<const W: usize>(sum: &mut [f32; W], vector: &[f32; W]) {
    for (s, v) in sum.iter_mut().zip(vector) {
        *s += v;
    }
}

/// Signed dynamic map, as bits.
const DYNAMIC_MAP_BITS: [u32; 256] = [
    0xbf7e_3333, 0xbf7a_999a, 0xbf77_0000, 0xbf73_6666, 0xbf6f_cccd, 0xbf6c_3333, 0xbf68_999a, 0xbf65_0000,
    0xbf61_6666, 0xbf5d_cccd, 0xbf5a_3333, 0xbf56_999a, 0xbf53_0000, 0xbf4f_6666, 0xbf4b_cccd, 0xbf48_3333,
    0xbf44_999a, 0xbf41_0000, 0xbf3d_6666, 0xbf39_cccd, 0xbf36_3334, 0xbf32_999a, 0xbf2f_0000, 0xbf2b_6666,
    0xbf27_cccd, 0xbf24_3334, 0xbf20_999a, 0xbf1d_0000, 0xbf19_6666, 0xbf15_cccd, 0xbf12_3334, 0xbf0e_999a,
    0xbf0b_0000, 0xbf07_6666, 0xbf03_cccc, 0xbf00_3333, 0xbef9_3332, 0xbef2_0000, 0xbeea_cccc, 0xbee3_999a,
    0xbedc_6666, 0xbed5_3333, 0xbece_0000, 0xbec6_cccc, 0xbebf_999a, 0xbeb8_6666, 0xbeb1_3333, 0xbeaa_0000,
    0xbea2_cccc, 0xbe9b_999a, 0xbe94_6666, 0xbe8d_3334, 0xbe86_0000, 0xbe7d_9999, 0xbe6f_3333, 0xbe60_cccd,
    0xbe52_6666, 0xbe44_0000, 0xbe35_999a, 0xbe27_3333, 0xbe18_cccd, 0xbe0a_6666, 0xbdf8_0000, 0xbddb_3334,
    0xbdc9_eb85, 0xbdc4_28f7, 0xbdbe_6667, 0xbdb8_a3d7, 0xbdb2_e148, 0xbdad_1eb8, 0xbda7_5c2a, 0xbda1_999a,
    0xbd9b_d70a, 0xbd96_147b, 0xbd90_51eb, 0xbd8a_8f5d, 0xbd84_cccd, 0xbd7e_147b, 0xbd72_8f5d, 0xbd67_0a3d,
    0xbd5b_851f, 0xbd50_0000, 0xbd44_7ae1, 0xbd38_f5c3, 0xbd2d_70a3, 0xbd21_eb85, 0xbd16_6667, 0xbd0a_e148,
    0xbcfe_b852, 0xbce7_ae15, 0xbcd0_a3d7, 0xbcb9_999a, 0xbca2_8f5d, 0xbc8b_851f, 0xbc68_f5c3, 0xbc3a_e148,
    0xbc1f_3b64, 0xbc16_0418, 0xbc0c_cccd, 0xbc03_9581, 0xbbf4_bc6a, 0xbbe2_4dd3, 0xbbcf_df3b, 0xbbbd_70a4,
    0xbbab_020d, 0xbb98_9374, 0xbb86_24dd, 0xbb67_6c8a, 0xbb42_8f5c, 0xbb1d_b22d, 0xbaf1_a9fc, 0xbaa7_ef9d,
    0xba77_65ff, 0xba59_e83e, 0xba3c_6a80, 0xba1e_ecc1, 0xba01_6f01, 0xb9c7_e283, 0xb98c_e705, 0xb923_d70b,
    0xb8ba_1f4b, 0xb88a_efb3, 0xb837_8034, 0xb7b2_4206, 0xb702_05ff, 0xb65a_1a94, 0xb513_a3b7, 0x0000_0000,
    0x3513_a3b7, 0x365a_1a94, 0x3702_05ff, 0x37b2_4206, 0x3837_8034, 0x388a_efb3, 0x38ba_1f4b, 0x3923_d70b,
    0x398c_e705, 0x39c7_e283, 0x3a01_6f01, 0x3a1e_ecc1, 0x3a3c_6a80, 0x3a59_e83e, 0x3a77_65ff, 0x3aa7_ef9d,
    0x3af1_a9fc, 0x3b1d_b22d, 0x3b42_8f5c, 0x3b67_6c8a, 0x3b86_24dd, 0x3b98_9374, 0x3bab_020d, 0x3bbd_70a4,
    0x3bcf_df3b, 0x3be2_4dd3, 0x3bf4_bc6a, 0x3c03_9581, 0x3c0c_cccd, 0x3c16_0418, 0x3c1f_3b64, 0x3c3a_e148,
    0x3c68_f5c3, 0x3c8b_851f, 0x3ca2_8f5d, 0x3cb9_999a, 0x3cd0_a3d7, 0x3ce7_ae15, 0x3cfe_b852, 0x3d0a_e148,
    0x3d16_6667, 0x3d21_eb85, 0x3d2d_70a3, 0x3d38_f5c3, 0x3d44_7ae1, 0x3d50_0000, 0x3d5b_851f, 0x3d67_0a3d,
    0x3d72_8f5d, 0x3d7e_147b, 0x3d84_cccd, 0x3d8a_8f5d, 0x3d90_51eb, 0x3d96_147b, 0x3d9b_d70a, 0x3da1_999a,
    0x3da7_5c2a, 0x3dad_1eb8, 0x3db2_e148, 0x3db8_a3d7, 0x3dbe_6667, 0x3dc4_28f7, 0x3dc9_eb85, 0x3ddb_3334,
    0x3df8_0000, 0x3e0a_6666, 0x3e18_cccd, 0x3e27_3333, 0x3e35_999a, 0x3e44_0000, 0x3e52_6666, 0x3e60_cccd,
    0x3e6f_3333, 0x3e7d_9999, 0x3e86_0000, 0x3e8d_3334, 0x3e94_6666, 0x3e9b_999a, 0x3ea2_cccc, 0x3eaa_0000,
    0x3eb1_3333, 0x3eb8_6666, 0x3ebf_999a, 0x3ec6_cccc, 0x3ece_0000, 0x3ed5_3333, 0x3edc_6666, 0x3ee3_999a,
    0x3eea_cccc, 0x3ef2_0000, 0x3ef9_3332, 0x3f00_3333, 0x3f03_cccc, 0x3f07_6666, 0x3f0b_0000, 0x3f0e_999a,
    0x3f12_3334, 0x3f15_cccd, 0x3f19_6666, 0x3f1d_0000, 0x3f20_999a, 0x3f24_3334, 0x3f27_cccd, 0x3f2b_6666,
    0x3f2f_0000, 0x3f32_999a, 0x3f36_3334, 0x3f39_cccd, 0x3f3d_6666, 0x3f41_0000, 0x3f44_999a, 0x3f48_3333,
    0x3f4b_cccd, 0x3f4f_6666, 0x3f53_0000, 0x3f56_999a, 0x3f5a_3333, 0x3f5d_cccd, 0x3f61_6666, 0x3f65_0000,
    0x3f68_999a, 0x3f6c_3333, 0x3f6f_cccd, 0x3f73_6666, 0x3f77_0000, 0x3f7a_999a, 0x3f7e_3333, 0x3f80_0000,
];
