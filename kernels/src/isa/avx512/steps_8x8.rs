//! The steps of the 8x8 product.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX-512 and its VNNI")]

use core::arch::x86_64::*;

use bytemuck::{Pod, must_cast};

use super::Avx512;
use super::codes::transpose;
use crate::isa::avx2::{add_lanes_of_four as add_lanes_of_four_256, prefetch};
use crate::isa::simd::steps_8x8::{
    PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan, Weights,
};
use crate::spec::SPAN;

impl Steps8x8 for Avx512 {
    const QUADS: usize = 2;
    const FEW: usize = 8;
    const EMPTY: Weights = [[0; 4 * ROWS]; 16];

    type Weights = Weights;

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]) {
        // Within 128 bits, which are consecutive bytes.
        let [a, b, c, d]: [__m256i; 4] = must_cast(*values);
        *out = must_cast([_mm256_packs_epi16(a, b), _mm256_packs_epi16(c, d)]);
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], ahead: usize, out: &mut Weights) {
        for packed in packed {
            prefetch(packed, ahead);
        }
        for (half, rows) in packed.as_chunks().0.iter().enumerate() {
            for (words, out) in transpose(*rows).into_iter().zip(out.as_chunks_mut::<2>().0) {
                let [even, odd] = self.decode(words);
                out[0].as_chunks_mut::<64>().0[half] = must_cast(even);
                out[1].as_chunks_mut::<64>().0[half] = must_cast(odd);
            }
        }
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn starts(&self, values: &[[i8; SPAN]; VECTORS]) -> [[i32; VECTORS]; 2] {
        let [a, b, c, d, e, f, g, h] = values;
        let above = add_lanes_of_four_256(sums_of(a), sums_of(b), sums_of(c), sums_of(d));
        let below = add_lanes_of_four_256(sums_of(e), sums_of(f), sums_of(g), sums_of(h));
        let zero = _mm256_setzero_si256();
        must_cast([
            _mm256_sub_epi32(zero, _mm256_permute2x128_si256::<0x20>(above, below)),
            _mm256_sub_epi32(zero, _mm256_permute2x128_si256::<0x31>(above, below)),
        ])
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        if N == 2 {
            add_groups::<2, 0, 0>(panel, vectors, sums);
            add_groups::<2, 0, 1>(panel, vectors, sums);
            return;
        }
        add_groups::<4, 0, 0>(panel, vectors, sums);
        add_groups::<4, 0, 1>(panel, vectors, sums);
        if N == 8 {
            add_groups::<4, 4, 0>(panel, vectors, sums);
            add_groups::<4, 4, 1>(panel, vectors, sums);
        }
    }

    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add_quads<const GROUPS: usize, const Q: usize, const N: usize>(
        &self,
        packed: [Quad<'_>; Q],
        values: [&[[i8; SPAN]]; N],
        absmax: [QuadAbsmax<'_, GROUPS>; Q],
        scales: [&[[f32; 2]]; N],
        ahead: usize,
        sums: &mut [[QuadSums; Q]; N],
    ) {
        // This is called with two quads only.
        let ([above, below], [absmax_above, absmax_below]) = (&packed[..], &absmax[..]) else {
            return;
        };
        let mut totals = [[_mm256_setzero_ps(); 2]; N];
        for n in 0..N {
            totals[n] = [must_cast(sums[n][0]), must_cast(sums[n][Q - 1])];
        }
        let (rows, absmax) = ([*above, *below], [*absmax_above, *absmax_below]);
        self.add_spans::<2, GROUPS, N>(rows, values, absmax, scales, 0, ahead, &mut totals);
        let first = values[0].len() / 2 * 2;
        if first < values[0].len() {
            self.add_spans::<1, GROUPS, N>(rows, values, absmax, scales, first, ahead, &mut totals);
        }
        for n in 0..N {
            sums[n][0] = must_cast(totals[n][0]);
            sums[n][Q - 1] = must_cast(totals[n][1]);
        }
    }
}

/// Adds the products of the first or the second groups of a panel's spans and the `V` vectors from `FIRST` on, whose sums
/// are in registers.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_groups<const V: usize, const FIRST: usize, const GROUP: usize>(
    panel: &[PanelSpan<Weights>],
    vectors: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    let mut totals = [[_mm512_setzero_ps(); 2]; V];
    for v in 0..V {
        totals[v] = must_cast(sums[FIRST + v][GROUP]);
    }
    for (panel, vectors) in panel.iter().zip(vectors) {
        let mut products = [[_mm512_setzero_si512(); 2]; V];
        for (v, products) in products.iter_mut().enumerate() {
            *products = [_mm512_set1_epi32(vectors.starts[GROUP][FIRST + v]); 2];
        }
        for j in 0..8 {
            let weights: [__m512i; 2] = must_cast(panel.weights[8 * GROUP + j]);
            // Words of even columns, then of odd ones.
            let word = j % 2 * 8 + 4 * GROUP + j / 2;
            for (v, products) in products.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(must_cast(vectors.values[FIRST + v].as_chunks::<4>().0[word]));
                products[0] = _mm512_dpbusd_epi32(products[0], weights[0], x);
                products[1] = _mm512_dpbusd_epi32(products[1], weights[1], x);
            }
        }
        let absmax: [__m512; 2] = must_cast(panel.absmax[GROUP]);
        for v in 0..V {
            let scale = _mm512_set1_ps(vectors.scales[GROUP][FIRST + v]);
            for r in 0..2 {
                let products = _mm512_cvtepi32_ps(products[v][r]);
                totals[v][r] = _mm512_add_ps(totals[v][r], _mm512_mul_ps(products, _mm512_mul_ps(absmax[r], scale)));
            }
        }
    }
    for v in 0..V {
        sums[FIRST + v][GROUP] = must_cast(totals[v]);
    }
}

/// 128 times the sums of four activations in each lane: of the first group in the low half, of the second in the high half.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn sums_of(values: &[i8; SPAN]) -> __m256i {
    let ([even, odd], bias) = (must_cast(*values), _mm256_set1_epi8(-128));
    _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), bias, even), bias, odd)
}

/// Thirty-two bytes in each half. With one span they are not needed in the second.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn halves<const SPANS: usize, T: Pod>(first: &[T; 32], last: &[T; 32]) -> __m512i {
    let low = _mm512_castsi256_si512(must_cast(*first));
    if SPANS == 1 { low } else { _mm512_inserti64x4::<1>(low, must_cast(*last)) }
}

/// The absmax of four rows in the two groups of one span, then in those of the other.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
#[inline]
fn absmax_of_groups<const SPANS: usize, const GROUPS: usize>(absmax: &[[[f32; 4]; GROUPS]; SPANS]) -> __m512 {
    let (first, last) = (absmax[0], absmax[SPANS - 1]);
    if GROUPS == 1 {
        let two = _mm512_castps256_ps512(must_cast([first[0], last[0]]));
        _mm512_shuffle_f32x4::<0b01_01_00_00>(two, two)
    } else {
        must_cast([[first[0], first[GROUPS - 1]], [last[0], last[GROUPS - 1]]])
    }
}

// Without features of their own, so that their closures are inlined: the compiler does not inline one with features into the
// function of the standard library that calls it.

/// What each slice has from one span on, `SPANS` by `SPANS`.
#[inline(always)]
fn pieces<T, const SPANS: usize, const N: usize>(slices: [&[T]; N], first: usize, len: usize) -> [&[[T; SPANS]]; N] {
    slices.map(|slice| &slice[first..].as_chunks().0[..len])
}

/// One piece of each.
#[inline(always)]
fn at<T, const N: usize>(slices: [&[T]; N], i: usize) -> [&T; N] {
    slices.map(|slice| &slice[i])
}

impl Avx512 {
    /// Adds the products of eight rows and some vectors from one span on: in each step `SPANS`, of which there may be one or two.
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    #[expect(clippy::too_many_arguments, reason = "those of `add_quads`")]
    fn add_spans<const SPANS: usize, const GROUPS: usize, const N: usize>(
        &self,
        [above, below]: [Quad<'_>; 2],
        values: [&[[i8; SPAN]]; N],
        absmax: [QuadAbsmax<'_, GROUPS>; 2],
        scales: [&[[f32; 2]]; N],
        first: usize,
        ahead: usize,
        totals: &mut [[__m256; 2]; N],
    ) {
        let len = (values[0].len() - first) / SPANS;
        let (above, below) = (pieces::<_, SPANS, 4>(above, first, len), pieces::<_, SPANS, 4>(below, first, len));
        let (values, scales) = (pieces::<_, SPANS, N>(values, first, len), pieces::<_, SPANS, N>(scales, first, len));
        let absmax = pieces::<_, SPANS, 2>(absmax, first, len);
        let mut sums = *totals;
        if N < 3 {
            for i in 0..len {
                let (x, absmax, scales) = (at(values, i), at(absmax, i), at(scales, i));
                self.add_quad::<SPANS, GROUPS, N, 0>(at(above, i), x, absmax[0], scales, ahead, &mut sums);
                self.add_quad::<SPANS, GROUPS, N, 1>(at(below, i), x, absmax[1], scales, ahead, &mut sums);
            }
        } else {
            // What rows share of more vectors would not stay in registers.
            for i in 0..len {
                let (x, absmax, scales) = (at(values, i), at(absmax, i), at(scales, i));
                self.add_quad::<SPANS, GROUPS, N, 0>(at(above, i), x, absmax[0], scales, ahead, &mut sums);
            }
            for i in 0..len {
                let (x, absmax, scales) = (at(values, i), at(absmax, i), at(scales, i));
                self.add_quad::<SPANS, GROUPS, N, 1>(at(below, i), x, absmax[1], scales, ahead, &mut sums);
            }
        }
        *totals = sums;
    }

    /// Adds the products of the first or the second four rows. Each has a register, and in it the two groups of one span and
    /// those of the other.
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn add_quad<const SPANS: usize, const GROUPS: usize, const N: usize, const QUAD: usize>(
        &self,
        rows: [&[[u8; SPAN / 2]; SPANS]; 4],
        values: [&[[i8; SPAN]; SPANS]; N],
        absmax: &[[[f32; 4]; GROUPS]; SPANS],
        scales: [&[[f32; 2]; SPANS]; N],
        ahead: usize,
        totals: &mut [[__m256; 2]; N],
    ) {
        let mut weights = [[_mm512_setzero_si512(); 2]; 4];
        for r in 0..4 {
            prefetch(rows[r], ahead);
            weights[r] = self.decode(halves::<SPANS, _>(&rows[r][0], &rows[r][SPANS - 1]));
        }
        let absmax = absmax_of_groups(absmax);
        for n in 0..N {
            let (first, last): ([[i8; 32]; 2], [[i8; 32]; 2]) =
                (must_cast(values[n][0]), must_cast(values[n][SPANS - 1]));
            let x = [halves::<SPANS, _>(&first[0], &last[0]), halves::<SPANS, _>(&first[1], &last[1])];
            let mut products = [self.start(x); 4];
            for r in 0..4 {
                let even = _mm512_dpbusd_epi32(products[r], weights[r][0], x[0]);
                products[r] = _mm512_dpbusd_epi32(even, weights[r][1], x[1]);
            }
            let products = _mm512_cvtepi32_ps(add_lanes_of_four(products));
            // In each 128 bits the scale of their group.
            let group = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let scales =
                _mm512_permutexvar_ps(group, _mm512_castps128_ps512(must_cast([scales[n][0], scales[n][SPANS - 1]])));
            let products = _mm512_castps_pd(_mm512_mul_ps(products, _mm512_mul_ps(absmax, scales)));
            totals[n][QUAD] = _mm256_add_ps(totals[n][QUAD], _mm512_castps512_ps256(_mm512_castpd_ps(products)));
            if SPANS == 2 {
                let second = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(products));
                totals[n][QUAD] = _mm256_add_ps(totals[n][QUAD], second);
            }
        }
    }

    /// What the sums of products of a span start with: minus 128 times the activations, because weights are larger by 128.
    #[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn start(&self, x: [__m512i; 2]) -> __m512i {
        let (zero, bias) = (_mm512_setzero_si512(), _mm512_set1_epi8(-128));
        _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, bias, x[0]), bias, x[1]))
    }

    /// The weights of packed bytes, larger by 128: of even columns and of odd ones.
    #[target_feature(enable = "avx512bw")]
    #[inline]
    fn decode(&self, packed: __m512i) -> [__m512i; 2] {
        let nibble = _mm512_set1_epi8(15);
        let (even, odd) = (_mm512_and_si512(_mm512_srli_epi16::<4>(packed), nibble), _mm512_and_si512(packed, nibble));
        [_mm512_shuffle_epi8(self.i8_book, even), _mm512_shuffle_epi8(self.i8_book, odd)]
    }
}

/// In each 128 bits the sums of the four lanes of each.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_lanes_of_four([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let pair = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (ab, cd) = (pair(a, b), pair(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}
