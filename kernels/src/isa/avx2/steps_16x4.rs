//! The steps of the 16x4 products.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;

use super::Avx2;
use super::codes::split_codes;
use super::registers::{add_products, broadcast, load_again, load_i16, opaque};
use crate::activations::Activations;
use crate::isa::simd::product_16x4;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_16x4::Steps16x4;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

impl<const VNNI: bool> Steps16x4 for Avx2<VNNI> {
    const VECTORS: usize = 8;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        mut lanes: [__m256; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [__m256; N] {
        // The lanes of eight vectors and the weights leave no register for the tables.
        let weights = if N < 8 {
            decode_span(packed, &self.i16_planes)
        } else {
            decode_span(packed, &self.i16_planes.each_ref().map(|plane| load_again(plane)))
        };
        let products = scales.map(|scales| core::array::from_fn(|g| absmax[g] * scales[g]));
        for (n, lanes) in lanes.iter_mut().enumerate() {
            let sums = _mm256_cvtepi32_ps(self.sums_of_span(weights, &values[n]));
            let factor = if N == 1 { spread_products(absmax, &scales[n]) } else { broadcast::<GROUPS>(&products[n]) };
            *lanes = _mm256_add_ps(*lanes, _mm256_mul_ps(sums, factor));
        }
        lanes
    }

    #[target_feature(enable = "avx2")]
    #[inline(never)]
    unsafe fn gemm_vectors<const GROUPS: usize, const N: usize>(
        steps: &Steps<Self>,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        product_16x4::gemm_vectors::<Self, GROUPS, N>(steps, matrix, activations, first, out);
    }
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

impl<const VNNI: bool> Avx2<VNNI> {
    /// The eight exact lane sums of the products of a span; see the top of the module.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn sums_of_span(&self, weights: [__m256i; 4], values: &[i16; SPAN]) -> __m256i {
        let [a, b, c, d] = weights;
        let values = values.as_chunks().0;
        let values = [load_i16(&values[0]), load_i16(&values[1]), load_i16(&values[2]), load_i16(&values[3])];
        if VNNI {
            let sums = _mm256_madd_epi16(a, values[0]);
            // SAFETY: `self` is only made where the CPU has AVX-VNNI.
            let sums = unsafe { add_products(sums, b, values[1]) };
            // SAFETY: as above.
            let sums = unsafe { add_products(sums, c, values[2]) };
            // SAFETY: as above.
            unsafe { add_products(sums, d, values[3]) }
        } else {
            let even = _mm256_add_epi32(_mm256_madd_epi16(a, values[0]), _mm256_madd_epi16(b, values[1]));
            let odd = _mm256_add_epi32(_mm256_madd_epi16(c, values[2]), _mm256_madd_epi16(d, values[3]));
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
