//! The 16x4 products, of one vector and of a batch.

use core::arch::x86_64::*;

use super::dequantize::{split_codes, u16_planes};
use super::vector::*;
use crate::activations::{Activations, SPAN};
use crate::isa::products::{self, Steps};
use crate::matrix::Nf4Matrix;
use crate::spec;

/// The 16x4 product.
#[target_feature(enable = "avx2")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    products::gemv(&Avx2::new(), matrix, activations, out);
}

/// The 16x4 product of a batch.
#[target_feature(enable = "avx2")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    products::gemm(&Avx2::new(), matrix, activations, out);
}

/// The two bytes of each entry of the 16x4 codebook, in both halves. Only code that has AVX2 can make it.
struct Avx2([__m256i; 2]);

impl Avx2 {
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Self(u16_planes(load_i16(&spec::CODEBOOK_I16)))
    }
}

impl Steps for Avx2 {
    type Lanes = __m256;
    const VECTORS: usize = 8;

    #[inline(always)]
    fn load(&self, lanes: &[f32; 8]) -> __m256 {
        // SAFETY: the processor has AVX2, for `self` exists.
        unsafe { load_f32(lanes) }
    }

    #[inline(always)]
    fn store(&self, out: &mut [f32; 8], lanes: __m256) {
        // SAFETY: the processor has AVX2, for `self` exists.
        unsafe { store_f32(out, lanes) }
    }

    #[inline(always)]
    fn add_lanes(&self, lanes: __m256) -> f32 {
        // SAFETY: the processor has AVX2, for `self` exists.
        unsafe { add_lanes(lanes) }
    }

    #[inline(always)]
    fn prefetch(&self, bytes: &[u8], ahead: usize) {
        prefetch(bytes, ahead);
    }

    #[inline(always)]
    fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        lanes: [__m256; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [__m256; N] {
        // SAFETY: the processor has AVX2, for `self` exists.
        unsafe { add_span(&self.0, lanes, packed, values, absmax, scales) }
    }

    fn gemm_vectors<const GROUPS: usize, const N: usize>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        // SAFETY: the processor has AVX2, for `self` exists.
        unsafe { gemm_vectors::<GROUPS, N>(self, matrix, activations, first, out) }
    }
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn gemm_vectors<const GROUPS: usize, const N: usize>(
    steps: &Avx2,
    matrix: &Nf4Matrix<'_>,
    activations: &Activations<'_>,
    first: usize,
    out: &mut [f32],
) {
    products::gemm_vectors::<Avx2, GROUPS, N>(steps, matrix, activations, first, out);
}

/// Adds the products of a span and `N` vectors to their lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_span<const GROUPS: usize, const N: usize>(
    planes: &[__m256i; 2],
    mut lanes: [__m256; N],
    packed: &[u8; SPAN / 2],
    values: &[[i16; SPAN]; N],
    absmax: &[f32; GROUPS],
    scales: &[[f32; GROUPS]; N],
) -> [__m256; N] {
    // The lanes of eight vectors and the weights leave no register for the tables.
    let weights = if N < Avx2::VECTORS {
        decode_span(packed, planes)
    } else {
        decode_span(packed, &[load_again(&planes[0]), load_again(&planes[1])])
    };
    let products = scales.map(|scales| core::array::from_fn(|g| absmax[g] * scales[g]));
    for (n, lanes) in lanes.iter_mut().enumerate() {
        let sums = _mm256_cvtepi32_ps(sums_of_span(weights, &values[n]));
        let factor = if N == 1 { spread_products(absmax, &scales[n]) } else { broadcast::<GROUPS>(&products[n]) };
        *lanes = _mm256_add_ps(*lanes, _mm256_mul_ps(sums, factor));
    }
    lanes
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
fn sums_of_span([a, b, c, d]: [__m256i; 4], values: &[i16; SPAN]) -> __m256i {
    let (values, _) = values.as_chunks();
    let even = _mm256_add_epi32(_mm256_madd_epi16(a, load_i16(&values[0])), _mm256_madd_epi16(b, load_i16(&values[1])));
    let odd = _mm256_add_epi32(_mm256_madd_epi16(c, load_i16(&values[2])), _mm256_madd_epi16(d, load_i16(&values[3])));
    _mm256_add_epi32(even, odd)
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
