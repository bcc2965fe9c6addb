//! The steps of the 16x4 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::Neon;
use super::codes::split_codes;
use super::registers::{F32x8, add, mul, one_after_the_other, spread};
use crate::activations::Activations;
use crate::isa::simd::batch_16x4;
use crate::isa::simd::panel_16x4;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_16x4::{Panel, PanelLanes, Panels16x4, Steps16x4};
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

impl Steps16x4 for Neon {
    // With eight vectors the compiler makes a loop over them, whose lanes are then in memory.
    const VECTORS: usize = 4;

    type Span = [int16x8_t; 8];

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load_span(&self, values: &[i16; SPAN]) -> [int16x8_t; 8] {
        must_cast(*values)
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode_span(&self, packed: &[u8; SPAN / 2]) -> [int16x8_t; 8] {
        decode_span(packed, &self.i16_planes)
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_span<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        weights: [int16x8_t; 8],
        values: [int16x8_t; 8],
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> F32x8 {
        let factors: [f32; GROUPS] = core::array::from_fn(|group| absmax[group] * scales[group]);
        // SAFETY: as for this function.
        unsafe { self.add_products(lanes, weights, values, &factors) }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_products<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        weights: [int16x8_t; 8],
        values: [int16x8_t; 8],
        factors: &[f32; GROUPS],
    ) -> F32x8 {
        let [low, high] = sums_of_span(weights, values);
        // `fmul` takes one element of a register as its factor, so nothing is spread.
        let mut lanes = add(lanes, mul([vcvtq_f32_s32(low), vcvtq_f32_s32(high)], spread(factors)));
        one_after_the_other(&mut lanes);
        lanes
    }

    #[target_feature(enable = "neon")]
    #[inline(never)]
    unsafe fn few_vectors<const GROUPS: usize, const N: usize>(
        steps: &Steps<Self>,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        batch_16x4::few_vectors::<Self, GROUPS, N>(steps, matrix, activations, first, out);
    }
}

impl Panels16x4 for Neon {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn store_span(&self, out: &mut [i16; SPAN], span: [int16x8_t; 8]) {
        *out = must_cast(span);
    }

    #[target_feature(enable = "neon")]
    #[inline(never)]
    unsafe fn add_panel<const GROUPS: usize>(
        steps: &Steps<Self>,
        panel: &Panel<GROUPS>,
        values: &[[i16; SPAN]],
        scales: &[f32],
        ahead: usize,
        lanes: &mut PanelLanes,
    ) {
        panel_16x4::add_panel(steps, panel, values, scales, ahead, lanes);
    }
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
