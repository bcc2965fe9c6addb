//! The 16x4 products, of one vector and of a batch.

use core::arch::aarch64::*;

use super::dequantize::{split_codes, u16_planes};
use super::vector::*;
use crate::activations::{Activations, SPAN};
use crate::isa::products::{self, Steps};
use crate::matrix::Nf4Matrix;
use crate::spec;

/// The 16x4 product.
#[target_feature(enable = "neon")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    products::gemv(&Neon::new(), matrix, activations, out);
}

/// The 16x4 product of a batch.
#[target_feature(enable = "neon")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    products::gemm(&Neon::new(), matrix, activations, out);
}

/// The two bytes of each entry of the 16x4 codebook. Only code that has NEON can make it.
struct Neon([uint8x16_t; 2]);

impl Neon {
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        let (book, _) = spec::CODEBOOK_I16.as_chunks();
        Self(u16_planes([0, 1].map(|i| vreinterpretq_u16_s16(load_i16(&book[i])))))
    }
}

impl Steps for Neon {
    type Lanes = F32x8;
    // With eight the compiler makes a loop over the vectors, whose lanes are then in memory.
    const VECTORS: usize = 4;

    #[inline(always)]
    fn load(&self, lanes: &[f32; 8]) -> F32x8 {
        // SAFETY: the processor has NEON, for `self` exists.
        unsafe { load_f32(lanes) }
    }

    #[inline(always)]
    fn store(&self, out: &mut [f32; 8], lanes: F32x8) {
        // SAFETY: the processor has NEON, for `self` exists.
        unsafe { store_f32(out, lanes) }
    }

    #[inline(always)]
    fn add_lanes(&self, lanes: F32x8) -> f32 {
        // SAFETY: the processor has NEON, for `self` exists.
        unsafe { add_lanes(lanes) }
    }

    #[inline(always)]
    fn prefetch(&self, bytes: &[u8], ahead: usize) {
        prefetch(bytes, ahead);
    }

    #[inline(always)]
    fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        lanes: [F32x8; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [F32x8; N] {
        // SAFETY: the processor has NEON, for `self` exists.
        unsafe { add_span(&self.0, lanes, packed, values, absmax, scales) }
    }

    fn gemm_vectors<const GROUPS: usize, const N: usize>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        // SAFETY: the processor has NEON, for `self` exists.
        unsafe { gemm_vectors::<GROUPS, N>(self, matrix, activations, first, out) }
    }
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn gemm_vectors<const GROUPS: usize, const N: usize>(
    steps: &Neon,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first: usize,
    out: &mut [f32],
) {
    products::gemm_vectors::<Neon, GROUPS, N>(steps, matrix, activations, first, out);
}

/// Adds the products of a span and `N` vectors to their lanes.
#[target_feature(enable = "neon")]
#[inline]
fn add_span<const GROUPS: usize, const N: usize>(
    planes: &[uint8x16_t; 2],
    mut lanes: [F32x8; N],
    packed: &[u8; SPAN / 2],
    values: &[[i16; SPAN]; N],
    absmax: &[f32; GROUPS],
    scales: &[[f32; GROUPS]; N],
) -> [F32x8; N] {
    let weights = decode_span(packed, planes);
    for ((lanes, values), scales) in lanes.iter_mut().zip(values).zip(scales) {
        let [low, high] = sums_of_span(weights, load_span(values));
        let sums = [vcvtq_f32_s32(low), vcvtq_f32_s32(high)];
        // Products of scalars: `fmul` takes one element of a register as its factor, so nothing is spread.
        let factors = spread::<GROUPS>(&core::array::from_fn(|g| absmax[g] * scales[g]));
        *lanes = sum(*lanes, product(sums, factors));
        if N > 1 {
            one_after_the_other(lanes);
        }
    }
    lanes
}

/// The eight exact lane sums of the products of a span; see the top of the module.
#[target_feature(enable = "neon")]
#[inline]
fn sums_of_span(w: [int16x8_t; 8], q: [int16x8_t; 8]) -> [int32x4_t; 2] {
    let mut sums = [vdupq_n_s32(0); 2];
    for (i, (w, q)) in w.into_iter().zip(q).enumerate() {
        let sum = &mut sums[i / 4];
        *sum = vmlal_s16(*sum, vget_low_s16(w), vget_low_s16(q));
        *sum = vmlal_high_s16(*sum, w, q);
    }
    sums
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[target_feature(enable = "neon")]
#[inline]
fn decode_span(packed: &[u8; SPAN / 2], [low, high]: &[uint8x16_t; 2]) -> [int16x8_t; 8] {
    let mut weights = [vdupq_n_s16(0); 8];
    for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
        for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
            let (low, high) = (vqtbl1q_u8(*low, codes), vqtbl1q_u8(*high, codes));
            weights[4 * half + odd] = vreinterpretq_s16_u8(vtrn1q_u8(low, high));
            weights[4 * half + odd + 2] = vreinterpretq_s16_u8(vtrn2q_u8(low, high));
        }
    }
    weights
}

/// 64 weights or activations.
#[target_feature(enable = "neon")]
#[inline]
fn load_span(values: &[i16; SPAN]) -> [int16x8_t; 8] {
    let mut out = [vdupq_n_s16(0); 8];
    for (out, values) in out.iter_mut().zip(values.as_chunks().0) {
        *out = load_i16(values);
    }
    out
}
