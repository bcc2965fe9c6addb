//! The steps of the 8x8 product.
//!
//! The engines have no products of 8-bit integers that can be told to be exact, so weights and activations become 16-bit
//! integers. For a weight that is one instruction: the bytes of each word are shifted up or masked, which leaves 256 times
//! the weight of the even or the odd byte. The sums of a group, below `2^27` then, are shifted down once.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, here too, where the target has what they need")]

use core::arch::wasm32::*;

use bytemuck::must_cast;

use super::Simd128;
use super::codes::split_codes;
use super::registers::{load_f32x4, store_f32x4};
use crate::isa::simd::steps_8x8::{
    PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, SPANS, Steps8x8, Sums, VECTORS, VectorSpan, Weights, trimmed,
};
use crate::spec::SPAN;

/// Sixteen columns as 16-bit integers: those of the even bytes and those of the odd ones.
type Words = [v128; 2];

/// The activations of a span of some vectors, four columns together: of each column the even bytes, then the odd ones.
type WideSpan<const V: usize> = [[[[i16; 2]; 2]; V]; 16];

impl Steps8x8 for Simd128 {
    const QUADS: usize = 1;
    const FEW: usize = 1;

    type Weights = Weights;
    const EMPTY: Weights = [[0; 4 * ROWS]; 16];

    #[inline]
    unsafe fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]) {
        for (values, out) in values.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            let [a, b]: [v128; 2] = must_cast(*values);
            *out = must_cast(i8x16_narrow_i16x8(a, b));
        }
    }

    #[inline]
    unsafe fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], _ahead: usize, out: &mut Weights) {
        for (four, rows) in packed.as_chunks::<4>().0.iter().enumerate() {
            for group in 0..2 {
                let words = transpose(rows.map(|row| must_cast(row.as_chunks::<16>().0[group])));
                for (i, words) in words.into_iter().enumerate() {
                    for (odd, codes) in split_codes(&must_cast(words)).into_iter().enumerate() {
                        out[8 * group + 2 * i + odd].as_chunks_mut::<16>().0[four] =
                            must_cast(u8x16_swizzle(self.i8_book, codes));
                    }
                }
            }
        }
    }

    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        if N == 2 {
            add_vectors::<2, 0>(panel, vectors, sums);
            return;
        }
        add_vectors::<4, 0>(panel, vectors, sums);
        if N == 8 {
            add_vectors::<4, 4>(panel, vectors, sums);
        }
    }

    #[inline]
    unsafe fn add_quads<const GROUPS: usize, const Q: usize, const N: usize>(
        &self,
        packed: [Quad<'_>; Q],
        values: [&[[i8; SPAN]]; N],
        absmax: [QuadAbsmax<'_, GROUPS>; Q],
        scales: [&[[f32; 2]]; N],
        _ahead: usize,
        sums: &mut [[QuadSums; Q]; N],
    ) {
        for n in 0..N {
            let spans = values[n].len();
            let (values, scales) = (values[n], &scales[n][..spans]);
            for ((packed, absmax), sums) in packed.into_iter().zip(absmax).zip(&mut sums[n]) {
                let ([a, b, c, d], absmax) = (trimmed(packed, spans), &absmax[..spans]);
                let mut totals: [v128; 2] = must_cast(*sums);
                for s in 0..spans {
                    let rows = [&a[s], &b[s], &c[s], &d[s]];
                    for (group, total) in totals.iter_mut().enumerate() {
                        let values = values[s].as_chunks::<16>().0;
                        // Even columns, then odd ones.
                        let x = [wide(must_cast(values[group])), wide(must_cast(values[2 + group]))];
                        let mut products = [u32x4_splat(0); 4];
                        for (products, row) in products.iter_mut().zip(rows) {
                            *products = self.dot(&row.as_chunks::<16>().0[group], x);
                        }
                        let block = group * GROUPS / 2;
                        let absmax = must_cast(absmax[s][block]);
                        *total = finish(*total, add_across(products), absmax, scales[s][group]);
                    }
                }
                *sums = must_cast(totals);
            }
        }
    }
}

impl Simd128 {
    /// 256 times the products of a group, of which each lane has a part.
    #[inline]
    fn dot(&self, packed: &[u8; 16], [even, odd]: [Words; 2]) -> v128 {
        let [even_codes, odd_codes] = split_codes(packed);
        let even_weights = words(u8x16_swizzle(self.i8_book, even_codes));
        let odd_weights = words(u8x16_swizzle(self.i8_book, odd_codes));
        i32x4_add(dot_words(even_weights, even), dot_words(odd_weights, odd))
    }
}

/// Adds the products of a panel and the `V` vectors from `FIRST` on to their sums.
#[inline]
fn add_vectors<const V: usize, const FIRST: usize>(
    panel: &[PanelSpan<Weights>],
    vectors: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    let mut spans: [WideSpan<V>; SPANS] = [[[[[0; 2]; 2]; V]; 16]; SPANS];
    for (span, vectors) in spans.iter_mut().zip(vectors) {
        for (v, values) in vectors.values[FIRST..FIRST + V].iter().enumerate() {
            for (i, values) in values.as_chunks::<16>().0.iter().enumerate() {
                let [even, odd]: [[[i16; 2]; 4]; 2] = must_cast(wide(must_cast(*values)));
                for word in 0..4 {
                    // Groups, then words, then even and odd columns.
                    span[8 * (i % 2) + 2 * word + i / 2][v] = [even[word], odd[word]];
                }
            }
        }
    }
    for four in 0..ROWS / 4 {
        add_group::<V, FIRST, 0>(panel, four, vectors, &spans, sums);
        add_group::<V, FIRST, 1>(panel, four, vectors, &spans, sums);
    }
}

/// As [`add_vectors`], for the first or the second groups of four rows, whose sums are in registers.
#[inline]
fn add_group<const V: usize, const FIRST: usize, const GROUP: usize>(
    panel: &[PanelSpan<Weights>],
    four: usize,
    vectors: &[VectorSpan],
    spans: &[WideSpan<V>; SPANS],
    sums: &mut [Sums; VECTORS],
) {
    let mut totals = [f32x4_splat(0.0); V];
    for v in 0..V {
        totals[v] = load_f32x4(&sums[FIRST + v][GROUP].as_chunks().0[four]);
    }
    for ((panel, vectors), span) in panel.iter().zip(vectors).zip(spans) {
        let mut products = [u32x4_splat(0); V];
        for (weights, x) in panel.weights.iter().zip(span).skip(8 * GROUP).take(8) {
            let weights = words(must_cast(weights.as_chunks::<16>().0[four]));
            for (products, [even, odd]) in products.iter_mut().zip(x) {
                let x = [u32x4_splat(must_cast(*even)), u32x4_splat(must_cast(*odd))];
                *products = i32x4_add(*products, dot_words(weights, x));
            }
        }
        let absmax = load_f32x4(&panel.absmax[GROUP].as_chunks().0[four]);
        for v in 0..V {
            totals[v] = finish(totals[v], products[v], absmax, vectors.scales[GROUP][FIRST + v]);
        }
    }
    for v in 0..V {
        store_f32x4(&mut sums[FIRST + v][GROUP].as_chunks_mut().0[four], totals[v]);
    }
}

/// 256 times the even and the odd bytes.
#[inline]
fn words(weights: v128) -> Words {
    [i16x8_shl(weights, 8), v128_and(weights, u16x8_splat(0xff00))]
}

/// The even and the odd bytes.
#[inline]
fn wide(values: v128) -> Words {
    [i16x8_shr(i16x8_shl(values, 8), 8), i16x8_shr(values, 8)]
}

/// Of each four columns the sum of the products.
#[inline]
fn dot_words(weights: Words, x: Words) -> v128 {
    i32x4_add(i32x4_dot_i16x8(weights[0], x[0]), i32x4_dot_i16x8(weights[1], x[1]))
}

/// The sums of the lanes of each.
#[inline]
fn add_across([a, b, c, d]: [v128; 4]) -> v128 {
    let [ab, cd] = [(a, b), (c, d)].map(|(a, b)| i32x4_add(low_words(a, b), high_words(a, b)));
    i32x4_add(i64x2_shuffle::<0, 2>(ab, cd), i64x2_shuffle::<1, 3>(ab, cd))
}

/// The 32-bit words of 16 bytes of four rows: word `i` of the result has those of row `r` in lane `r`.
#[inline]
fn transpose([a, b, c, d]: [v128; 4]) -> [v128; 4] {
    let [low_ab, low_cd, high_ab, high_cd] = [low_words(a, b), low_words(c, d), high_words(a, b), high_words(c, d)];
    [
        i64x2_shuffle::<0, 2>(low_ab, low_cd),
        i64x2_shuffle::<1, 3>(low_ab, low_cd),
        i64x2_shuffle::<0, 2>(high_ab, high_cd),
        i64x2_shuffle::<1, 3>(high_ab, high_cd),
    ]
}

/// The first words of both in turn.
#[inline]
fn low_words(a: v128, b: v128) -> v128 {
    i32x4_shuffle::<0, 4, 1, 5>(a, b)
}

/// The last words of both in turn.
#[inline]
fn high_words(a: v128, b: v128) -> v128 {
    i32x4_shuffle::<2, 6, 3, 7>(a, b)
}

/// Adds the products of a group, 256 times as large, in four rows.
#[inline]
fn finish(total: v128, products: v128, absmax: v128, scale: f32) -> v128 {
    let products = f32x4_convert_i32x4(i32x4_shr(products, 8));
    f32x4_add(total, f32x4_mul(products, f32x4_mul(absmax, f32x4_splat(scale))))
}
