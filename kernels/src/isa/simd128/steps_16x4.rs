//! The steps of the 16x4 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, here too, where the target has what they need")]

use core::arch::wasm32::*;

use bytemuck::must_cast;

use super::Simd128;
use super::codes::{look_up_u16, split_codes};
use super::registers::{F32x8, add, mul, spread};
use crate::activations::Activations;
use crate::isa::simd::batch_16x4;
use crate::isa::simd::panel_16x4;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_16x4::{Panel, PanelLanes, Panels16x4, Steps16x4};
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

impl Steps16x4 for Simd128 {
    // The lanes of eight vectors are in memory on an engine with 16 registers; four were slower all the same.
    const VECTORS: usize = 8;

    type Span = [v128; 8];

    #[inline]
    unsafe fn load_span(&self, values: &[i16; SPAN]) -> [v128; 8] {
        must_cast(*values)
    }

    #[inline]
    unsafe fn decode_span(&self, packed: &[u8; SPAN / 2]) -> [v128; 8] {
        decode_span(packed, &self.i16_planes)
    }

    #[inline]
    unsafe fn add_span<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        weights: [v128; 8],
        values: [v128; 8],
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> F32x8 {
        let factors: [f32; GROUPS] = core::array::from_fn(|group| absmax[group] * scales[group]);
        // SAFETY: as for this function.
        unsafe { self.add_products(lanes, weights, values, &factors) }
    }

    #[inline]
    unsafe fn add_products<const GROUPS: usize>(
        &self,
        lanes: F32x8,
        weights: [v128; 8],
        values: [v128; 8],
        factors: &[f32; GROUPS],
    ) -> F32x8 {
        let [low, high] = sums_of_span(weights, values);
        add(lanes, mul([f32x4_convert_i32x4(low), f32x4_convert_i32x4(high)], spread(factors)))
    }

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

impl Panels16x4 for Simd128 {
    #[inline]
    unsafe fn store_span(&self, out: &mut [i16; SPAN], span: [v128; 8]) {
        *out = must_cast(span);
    }

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
#[inline]
fn sums_of_span(w: [v128; 8], q: [v128; 8]) -> [v128; 2] {
    let dot = |i: usize| i32x4_dot_i16x8(w[i], q[i]);
    let half = |i: usize| i32x4_add(i32x4_add(dot(i), dot(i + 1)), i32x4_add(dot(i + 4), dot(i + 5)));
    [half(0), half(2)]
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[inline]
fn decode_span(packed: &[u8; SPAN / 2], planes: &[v128; 2]) -> [v128; 8] {
    let mut weights = [i16x8_splat(0); 8];
    for (half, bytes) in packed.as_chunks().0.iter().enumerate() {
        for (odd, codes) in split_codes(bytes).into_iter().enumerate() {
            [weights[4 * odd + 2 * half], weights[4 * odd + 2 * half + 1]] = look_up_u16(codes, planes);
        }
    }
    weights
}
