//! The steps of the 16x4 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::Avx2;
use super::codes::split_codes;
use super::registers::{add_products, broadcast, opaque};
use crate::activations::Activations;
use crate::isa::simd::batch_16x4;
use crate::isa::simd::panel_16x4;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_16x4::{Panel, PanelLanes, Panels16x4, Steps16x4};
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

impl<const VNNI: bool> Steps16x4 for Avx2<VNNI> {
    const VECTORS: usize = 8;

    type Span = [__m256i; 4];

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load_span(&self, values: &[i16; SPAN]) -> [__m256i; 4] {
        must_cast(*values)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode_span(&self, packed: &[u8; SPAN / 2]) -> [__m256i; 4] {
        decode_span(packed, &self.i16_planes)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_span<const GROUPS: usize>(
        &self,
        lanes: __m256,
        weights: [__m256i; 4],
        values: [__m256i; 4],
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> __m256 {
        let sums = _mm256_cvtepi32_ps(self.sums_of_span(weights, values));
        _mm256_add_ps(lanes, _mm256_mul_ps(sums, spread_products(absmax, scales)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_products<const GROUPS: usize>(
        &self,
        lanes: __m256,
        weights: [__m256i; 4],
        values: [__m256i; 4],
        factors: &[f32; GROUPS],
    ) -> __m256 {
        let sums = _mm256_cvtepi32_ps(self.sums_of_span(values, weights));
        _mm256_add_ps(lanes, _mm256_mul_ps(sums, broadcast(factors)))
    }

    #[target_feature(enable = "avx2")]
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

impl<const VNNI: bool> Panels16x4 for Avx2<VNNI> {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn store_span(&self, out: &mut [i16; SPAN], span: [__m256i; 4]) {
        *out = must_cast(span);
    }

    #[target_feature(enable = "avx2")]
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

/// The products of absmax and activation scale for each lane: of one group, or of two for the two halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::isa) fn spread_products<const GROUPS: usize>(absmax: &[f32; GROUPS], scales: &[f32; GROUPS]) -> __m256 {
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

impl<const VNNI: bool> Avx2<VNNI> {
    /// The eight exact lane sums of the products of a span; see the top of the module.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn sums_of_span(&self, [a, b, c, d]: [__m256i; 4], [e, f, g, h]: [__m256i; 4]) -> __m256i {
        if VNNI {
            let sums = _mm256_madd_epi16(a, e);
            // SAFETY: `self` is only made where the CPU has AVX-VNNI.
            let sums = unsafe { add_products(sums, b, f) };
            // SAFETY: as above.
            let sums = unsafe { add_products(sums, c, g) };
            // SAFETY: as above.
            unsafe { add_products(sums, d, h) }
        } else {
            let even = _mm256_add_epi32(_mm256_madd_epi16(a, e), _mm256_madd_epi16(b, f));
            let odd = _mm256_add_epi32(_mm256_madd_epi16(c, g), _mm256_madd_epi16(d, h));
            _mm256_add_epi32(even, odd)
        }
    }
}

/// The 64 weights of a span, as 16-bit integers in the order of the activations.
#[target_feature(enable = "avx2")]
#[inline]
fn decode_span(packed: &[u8; SPAN / 2], [low, high]: &[__m256i; 2]) -> [__m256i; 4] {
    let [(even_lo, even_hi), (odd_lo, odd_hi)] =
        split_codes(packed).map(|codes| (_mm256_shuffle_epi8(*low, codes), _mm256_shuffle_epi8(*high, codes)));
    [
        _mm256_unpacklo_epi8(even_lo, even_hi),
        _mm256_unpackhi_epi8(even_lo, even_hi),
        _mm256_unpacklo_epi8(odd_lo, odd_hi),
        _mm256_unpackhi_epi8(odd_lo, odd_hi),
    ]
}
