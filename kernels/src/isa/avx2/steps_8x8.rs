//! The steps of the 8x8 product.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have AVX2")]

use core::arch::x86_64::*;

use bytemuck::must_cast;

use super::Avx2;
use super::codes::split_codes;
use super::registers::{add_byte_products, broadcast, load_f32, prefetch, prefetch_second, store_f32};
use crate::isa::simd::steps_8x8::{
    PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan, trimmed, trimmed_vectors,
};
use crate::spec::SPAN;

/// A span of eight rows, as one multiplies with it.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(in crate::isa) struct EightRows {
    /// Of sixteen times four columns the magnitudes, then -1 for each weight that is negative and 0 for others. With
    /// AVX-VNNI the weights, larger by 128, and nothing.
    weights: [[u8; 64]; 16],
    /// What sums of products start with, for each group: the sum of the magnitudes of negative weights; see [`dot`].
    starts: [[i32; 8]; 2],
}

impl<const VNNI: bool> Steps8x8 for Avx2<VNNI> {
    const QUADS: usize = 1;
    const FEW: usize = 8;
    /// Measured on Zen 4 with 4096 columns, from DRAM: as fast as 32 KB, and 1.06 times as fast as 8 KB.
    const AHEAD: usize = 16 << 10;
    const EMPTY: [EightRows; ROWS / 8] = [EightRows { weights: [[0; 64]; 16], starts: [[0; 8]; 2] }; ROWS / 8];

    type Weights = [EightRows; ROWS / 8];

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]) {
        // Within 128 bits, which are consecutive bytes.
        let [a, b, c, d]: [__m256i; 4] = must_cast(*values);
        *out = must_cast([_mm256_packs_epi16(a, b), _mm256_packs_epi16(c, d)]);
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], ahead: usize, out: &mut [EightRows; ROWS / 8]) {
        for packed in packed {
            prefetch(packed, ahead);
        }
        for (rows, out) in packed.as_chunks().0.iter().zip(out) {
            let mut starts = [_mm256_setzero_si256(); 2];
            for (i, words) in transpose(*rows).into_iter().enumerate() {
                let [even, odd] = split_codes(&must_cast(words));
                let (even, odd) = (_mm256_shuffle_epi8(self.i8_book, even), _mm256_shuffle_epi8(self.i8_book, odd));
                let (even, odd) = if VNNI {
                    ([even, even], [odd, odd])
                } else {
                    let (even, odd) = (magnitudes(even), magnitudes(odd));
                    let negative = _mm256_add_epi32(negative(even), negative(odd));
                    starts[i / 4] = _mm256_add_epi32(starts[i / 4], negative);
                    (even, odd)
                };
                [out.weights[2 * i], out.weights[2 * i + 1]] = [must_cast(even), must_cast(odd)];
            }
            out.starts = must_cast(starts);
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn starts(&self, values: &[[i8; SPAN]; VECTORS]) -> [[i32; VECTORS]; 2] {
        let [a, b, c, d, e, f, g, h] = values;
        let above = add_lanes_of_four(self.start(a), self.start(b), self.start(c), self.start(d));
        let below = add_lanes_of_four(self.start(e), self.start(f), self.start(g), self.start(h));
        must_cast([_mm256_permute2x128_si256::<0x20>(above, below), _mm256_permute2x128_si256::<0x31>(above, below)])
    }

    #[target_feature(enable = "avx2")]
    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<[EightRows; ROWS / 8]>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        for eight in 0..ROWS / 8 {
            if N == 2 {
                self.add_groups::<2, 0, 0>(panel, eight, vectors, sums);
                self.add_groups::<2, 0, 1>(panel, eight, vectors, sums);
                continue;
            }
            self.add_groups::<4, 0, 0>(panel, eight, vectors, sums);
            self.add_groups::<4, 0, 1>(panel, eight, vectors, sums);
            if N == 8 {
                self.add_groups::<4, 4, 0>(panel, eight, vectors, sums);
                self.add_groups::<4, 4, 1>(panel, eight, vectors, sums);
            }
        }
    }

    #[target_feature(enable = "avx2")]
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
        let (values, scales) = trimmed_vectors(values, scales);
        let spans = values[0].len();
        for (q, (packed, absmax)) in packed.into_iter().zip(absmax).enumerate() {
            let ([a, b, c, d], absmax) = (trimmed(packed, spans), &absmax[..spans]);
            let mut totals = [_mm256_setzero_ps(); N];
            for n in 0..N {
                totals[n] = load_f32(&sums[n][q]);
            }
            for s in 0..spans {
                if s.is_multiple_of(2) {
                    for row in [a, b, c, d] {
                        prefetch_second(&row[s], ahead);
                    }
                }
                let mut starts = [_mm256_setzero_si256(); N];
                for n in 0..N {
                    starts[n] = self.start(&values[n][s]);
                }
                // Two rows at a time, so that what waits for the others stays in registers.
                let ab = self.products_of_two([&a[s], &b[s]], &values, s, starts);
                let cd = self.products_of_two([&c[s], &d[s]], &values, s, starts);
                let absmax = groups(&absmax[s]);
                for n in 0..N {
                    let products = _mm256_cvtepi32_ps(join_pairs(ab[n], cd[n]));
                    let factors = _mm256_mul_ps(absmax, broadcast(&scales[n][s]));
                    totals[n] = _mm256_add_ps(totals[n], _mm256_mul_ps(products, factors));
                }
            }
            for n in 0..N {
                store_f32(&mut sums[n][q], totals[n]);
            }
        }
    }
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// What the sums of products of a span start with: minus 128 times the activations, where weights are larger by 128.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn start(&self, values: &[i8; SPAN]) -> __m256i {
        let (zero, [even, odd]) = (_mm256_setzero_si256(), must_cast(*values));
        if !VNNI {
            return zero;
        }
        let bias = _mm256_set1_epi8(-128);
        // SAFETY: `self` is only made where the CPU has AVX-VNNI.
        let sums = unsafe { add_byte_products(zero, bias, even) };
        // SAFETY: as above.
        _mm256_sub_epi32(zero, unsafe { add_byte_products(sums, bias, odd) })
    }

    /// Adds the products of a span of two rows and some vectors to `starts`: as [`add_pairs`] leaves them.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn products_of_two<const N: usize>(
        &self,
        [a, b]: [&[u8; 32]; 2],
        values: &[&[[i8; SPAN]]; N],
        span: usize,
        starts: [__m256i; N],
    ) -> [__m256i; N] {
        let mut sums = starts;
        let weights = self.look_up(a);
        for n in 0..N {
            sums[n] = self.add_span::<N>(starts[n], weights, &values[n][span]);
        }
        let weights = self.look_up(b);
        for n in 0..N {
            sums[n] = add_pairs(sums[n], self.add_span::<N>(starts[n], weights, &values[n][span]));
        }
        sums
    }

    /// The weights of even and of odd columns.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn look_up(&self, packed: &[u8; 32]) -> [__m256i; 2] {
        let [even, odd] = split_codes(packed);
        [_mm256_shuffle_epi8(self.i8_book, even), _mm256_shuffle_epi8(self.i8_book, odd)]
    }

    /// Adds the products of a span to `start`: of four columns in each lane.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn add_span<const N: usize>(&self, start: __m256i, [even, odd]: [__m256i; 2], values: &[i8; SPAN]) -> __m256i {
        let x: [__m256i; 2] = must_cast(*values);
        if VNNI {
            // SAFETY: `self` is only made where the CPU has AVX-VNNI.
            let sums = unsafe { add_byte_products(start, even, x[0]) };
            // SAFETY: as above.
            unsafe { add_byte_products(sums, odd, x[1]) }
        } else if N > 2 {
            // The magnitudes of weights serve all vectors.
            _mm256_add_epi32(dot_signed(even, x[0]), dot_signed(odd, x[1]))
        } else {
            // Those of activations serve all rows.
            _mm256_add_epi32(dot_signed(x[0], even), dot_signed(x[1], odd))
        }
    }

    /// Adds the products of the weights of a panel and activations, of four columns in each lane.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn add(&self, sums: __m256i, weights: [__m256i; 2], x: __m256i) -> __m256i {
        if VNNI {
            // SAFETY: `self` is only made where the CPU has AVX-VNNI.
            unsafe { add_byte_products(sums, weights[0], x) }
        } else {
            _mm256_add_epi32(sums, dot(weights, x))
        }
    }

    /// Adds the products of the first or the second groups of eight rows of a panel and the `V` vectors from `FIRST` on,
    /// whose sums are in registers.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn add_groups<const V: usize, const FIRST: usize, const GROUP: usize>(
        &self,
        panel: &[PanelSpan<[EightRows; ROWS / 8]>],
        eight: usize,
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        let mut totals = [_mm256_setzero_ps(); V];
        for v in 0..V {
            totals[v] = load_f32(&sums[FIRST + v][GROUP].as_chunks().0[eight]);
        }
        for (panel, vectors) in panel.iter().zip(vectors) {
            let rows = &panel.weights[eight];
            let mut products: [__m256i; V] = [must_cast(rows.starts[GROUP]); V];
            if VNNI {
                for (v, products) in products.iter_mut().enumerate() {
                    *products = _mm256_set1_epi32(vectors.starts[GROUP][FIRST + v]);
                }
            }
            for j in 0..8 {
                let weights: [__m256i; 2] = must_cast(rows.weights[8 * GROUP + j]);
                // Words of even columns, then of odd ones.
                let word = j % 2 * 8 + 4 * GROUP + j / 2;
                for (v, products) in products.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(must_cast(vectors.values[FIRST + v].as_chunks::<4>().0[word]));
                    *products = self.add(*products, weights, x);
                }
            }
            let absmax = load_f32(&panel.absmax[GROUP].as_chunks().0[eight]);
            for v in 0..V {
                let factors = _mm256_mul_ps(absmax, _mm256_set1_ps(vectors.scales[GROUP][FIRST + v]));
                totals[v] = _mm256_add_ps(totals[v], _mm256_mul_ps(_mm256_cvtepi32_ps(products[v]), factors));
            }
        }
        for v in 0..V {
            store_f32(&mut sums[FIRST + v][GROUP].as_chunks_mut().0[eight], totals[v]);
        }
    }
}

/// In each half the sums of the four lanes of `a`, `b`, `c` and `d`.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::isa) fn add_lanes_of_four(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m256i {
    join_pairs(add_pairs(a, b), add_pairs(c, d))
}

/// In each half two sums of two lanes of `a` and of `b`, in turn. Not `vphaddd`, which is three instructions on some CPUs and
/// four on others.
#[target_feature(enable = "avx2")]
#[inline]
fn add_pairs(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b))
}

/// In each half what `add_pairs` of `a` and `b`, and of `c` and `d`, leaves to be added.
#[target_feature(enable = "avx2")]
#[inline]
fn join_pairs(ab: __m256i, cd: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
}

/// The absmax of a span of four rows: of their first groups in the low half, of their second ones in the high half.
#[target_feature(enable = "avx2")]
#[inline]
fn groups<const GROUPS: usize>(absmax: &[[f32; 4]; GROUPS]) -> __m256 {
    _mm256_set_m128(must_cast(absmax[GROUPS - 1]), must_cast(absmax[0]))
}

/// The magnitudes of weights, and -1 for each that is negative.
#[target_feature(enable = "avx2")]
#[inline]
fn magnitudes(weights: __m256i) -> [__m256i; 2] {
    [_mm256_abs_epi8(weights), _mm256_cmpgt_epi8(_mm256_setzero_si256(), weights)]
}

/// The sums of the magnitudes of negative weights, of four columns in each lane.
#[target_feature(enable = "avx2")]
#[inline]
fn negative([magnitudes, signs]: [__m256i; 2]) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, _mm256_abs_epi8(signs)), _mm256_set1_epi16(1))
}

/// The products of four columns in each lane, less the magnitudes of the negative weights.
///
/// `vpmaddubsw` takes one factor without a sign, so the signs of the weights go to the activations: all bits of `x` are
/// changed where a weight is negative, which gives `-x - 1`. Two products are at most `2 * 124 * 128`, so it does not
/// saturate. `vpsignb` would give `-x`, but shares the ports of the multiplications.
#[target_feature(enable = "avx2")]
#[inline]
fn dot([magnitudes, signs]: [__m256i; 2], x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_xor_si256(x, signs));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// The products of four columns in each lane, from the magnitudes of `a` and `b` with the signs of `a`.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_signed(a: __m256i, b: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// The eight 32-bit words of a span of eight rows: word `i` of the result has that of row `r` in lane `r`.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose(rows: [&[u8; 32]; 8]) -> [__m256i; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    let (above, below) = (transpose_four(a, b, c, d), transpose_four(e, f, g, h));
    let mut words = [_mm256_setzero_si256(); 8];
    for i in 0..4 {
        words[i] = _mm256_permute2x128_si256::<0x20>(above[i], below[i]);
        words[4 + i] = _mm256_permute2x128_si256::<0x31>(above[i], below[i]);
    }
    words
}

/// As [`transpose`], for four rows: words `i` and `i + 4`, each in a half.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_four(a: &[u8; 32], b: &[u8; 32], c: &[u8; 32], d: &[u8; 32]) -> [__m256i; 4] {
    let (a, b, c, d) = (must_cast(*a), must_cast(*b), must_cast(*c), must_cast(*d));
    let (low_01, high_01) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (low_23, high_23) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(low_01, low_23),
        _mm256_unpackhi_epi64(low_01, low_23),
        _mm256_unpacklo_epi64(high_01, high_23),
        _mm256_unpackhi_epi64(high_01, high_23),
    ]
}
