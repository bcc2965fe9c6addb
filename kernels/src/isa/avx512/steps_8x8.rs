//! The steps of the 8x8 product.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX-512 and its VNNI")]

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::Avx512;
use super::codes::transpose;
use super::registers::two_spans;
use crate::isa::avx2::{Avx2, add_lanes_of_four as add_lanes_of_four_256, prefetch, prefetch_second};
use crate::isa::simd::steps_8x8::{
    PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan, Weights, trimmed, trimmed_vectors,
};
use crate::spec::SPAN;

impl Steps8x8 for Avx512 {
    const QUADS: usize = 2;
    const FEW: usize = 8;
    const AHEAD: usize = <Avx2 as Steps8x8>::AHEAD;
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
        let (values, scales) = trimmed_vectors(values, scales);
        let spans = values[0].len();
        let ([a, b, c, d], [e, f, g, h]) = (trimmed(*above, spans), trimmed(*below, spans));
        let (absmax_above, absmax_below) = (&absmax_above[..spans], &absmax_below[..spans]);
        let mut totals = [_mm512_setzero_ps(); N];
        for n in 0..N {
            totals[n] = must_cast([sums[n][0], sums[n][Q - 1]]);
        }
        for s in 0..spans {
            if s.is_multiple_of(2) {
                for row in [a, b, c, d, e, f, g, h] {
                    prefetch_second(&row[s], ahead);
                }
            }
            let pairs =
                [two_spans(&a[s], &e[s]), two_spans(&b[s], &f[s]), two_spans(&c[s], &g[s]), two_spans(&d[s], &h[s])];
            let mut weights = [[_mm512_setzero_si512(); 2]; 4];
            for r in 0..4 {
                weights[r] = self.decode(pairs[r]);
            }
            let (above, below) = (&absmax_above[s], &absmax_below[s]);
            let absmax = must_cast([above[0], above[GROUPS - 1], below[0], below[GROUPS - 1]]);
            for n in 0..N {
                let [even, odd]: [__m256i; 2] = must_cast(values[n][s]);
                let x = [_mm512_broadcast_i64x4(even), _mm512_broadcast_i64x4(odd)];
                let mut products = [self.start(x); 4];
                for r in 0..4 {
                    let even = _mm512_dpbusd_epi32(products[r], weights[r][0], x[0]);
                    products[r] = _mm512_dpbusd_epi32(even, weights[r][1], x[1]);
                }
                let products = _mm512_cvtepi32_ps(add_lanes_of_four(products));
                let scales = scales[n][s];
                let scales = _mm512_mask_blend_ps(0xf0f0, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
                totals[n] = _mm512_add_ps(totals[n], _mm512_mul_ps(products, _mm512_mul_ps(absmax, scales)));
            }
        }
        for n in 0..N {
            [sums[n][0], sums[n][Q - 1]] = must_cast(totals[n]);
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

impl Avx512 {
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
