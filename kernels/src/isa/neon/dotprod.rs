//! The steps of the 8x8 product by `sdot`, with rows in the lanes of a register.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON with `dotprod`")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::registers::{dot, dot_lane, prefetch};
use super::steps_8x8::{AddGroup, Book, Group, add_across, add_quads, decode, finish, narrow};
use crate::isa::simd::steps_8x8::{PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan};
use crate::spec::{GROUP_8X8, SPAN};

/// The weights of a group in eight rows, of the even columns and of the odd ones: four of each row, then the next four.
type EightRows = [[[u8; 4 * 8]; 4]; 2];

/// NEON with `dotprod`.
pub(super) struct Dotprod {
    pub(super) book: Book,
}

impl AddGroup for Dotprod {
    #[target_feature(enable = "neon,dotprod")]
    #[inline]
    unsafe fn add_group(
        &self,
        total: float32x4_t,
        rows: [&[u8; GROUP_8X8 / 2]; 4],
        x: Group,
        absmax: float32x4_t,
        scale: f32,
    ) -> float32x4_t {
        let mut products = [vdupq_n_s32(0); 4];
        for (products, row) in products.iter_mut().zip(rows) {
            let [even, odd] = decode(must_cast(*row), self.book);
            *products = dot(dot(*products, even, x[0]), odd, x[1]);
        }
        finish(total, add_across(products), absmax, scale)
    }
}

impl Steps8x8 for Dotprod {
    const QUADS: usize = 1;
    const FEW: usize = 1;

    type Weights = [[EightRows; ROWS / 8]; 2];
    const EMPTY: Self::Weights = [[[[[0; 32]; 4]; 2]; ROWS / 8]; 2];

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]) {
        narrow(values, out);
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], ahead: usize, out: &mut Self::Weights) {
        packed.iter().for_each(|row| prefetch(&row[..], ahead));
        for (group, out) in out.iter_mut().enumerate() {
            for (quad, rows) in packed.as_chunks::<4>().0.iter().enumerate() {
                let words = transpose(rows.map(|row| must_cast(row.as_chunks::<16>().0[group])));
                for (word, words) in words.into_iter().enumerate() {
                    for (weights, out) in decode(words, self.book).into_iter().zip(&mut out[quad / 2]) {
                        out[word].as_chunks_mut::<16>().0[quad % 2] = must_cast(weights);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "neon,dotprod")]
    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Self::Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        for eight in 0..ROWS / 8 {
            if N == 2 {
                add_eight_rows::<2, 0, 0>(panel, eight, vectors, sums);
                add_eight_rows::<2, 0, 1>(panel, eight, vectors, sums);
            } else {
                add_eight_rows::<4, 0, 0>(panel, eight, vectors, sums);
                add_eight_rows::<4, 0, 1>(panel, eight, vectors, sums);
            }
            if N == 8 {
                add_eight_rows::<4, 4, 0>(panel, eight, vectors, sums);
                add_eight_rows::<4, 4, 1>(panel, eight, vectors, sums);
            }
        }
    }

    #[target_feature(enable = "neon,dotprod")]
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
        // SAFETY: as for this function.
        unsafe { add_quads(self, packed, values, absmax, scales, ahead, sums) };
    }
}

/// Adds the products of eight rows of a panel and `V` vectors, from number `FIRST` on, to their sums: of even
/// groups (`GROUP` is 0) or of odd ones, so that one half of the sums at a time takes registers.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_eight_rows<const V: usize, const FIRST: usize, const GROUP: usize>(
    panel: &[PanelSpan<<Dotprod as Steps8x8>::Weights>],
    eight: usize,
    vectors: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    let mut totals = [[vdupq_n_f32(0.0); 2]; V];
    for (totals, sums) in totals.iter_mut().zip(&sums[FIRST..]) {
        *totals = must_cast(sums[GROUP].as_chunks::<8>().0[eight]);
    }
    for (panel, vectors) in panel.iter().zip(vectors) {
        let mut products = [[vdupq_n_s32(0); 2]; V];
        for (odd, weights) in panel.weights[GROUP][eight].iter().enumerate() {
            let mut x = [vdupq_n_s8(0); V];
            for (x, values) in x.iter_mut().zip(&vectors.values[FIRST..]) {
                *x = must_cast(values.as_chunks::<16>().0[2 * GROUP + odd]);
            }
            add_word::<0, V>(&mut products, weights, &x);
            add_word::<1, V>(&mut products, weights, &x);
            add_word::<2, V>(&mut products, weights, &x);
            add_word::<3, V>(&mut products, weights, &x);
        }
        let absmax: [float32x4_t; 2] = must_cast(panel.absmax[GROUP].as_chunks::<8>().0[eight]);
        for (v, (totals, products)) in totals.iter_mut().zip(products).enumerate() {
            for ((total, products), absmax) in totals.iter_mut().zip(products).zip(absmax) {
                *total = finish(*total, products, absmax, vectors.scales[GROUP][FIRST + v]);
            }
        }
    }
    for (totals, sums) in totals.into_iter().zip(&mut sums[FIRST..]) {
        sums[GROUP].as_chunks_mut::<8>().0[eight] = must_cast(totals);
    }
}

/// Adds the products of the columns of word `WORD`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_word<const WORD: u8, const V: usize>(
    products: &mut [[int32x4_t; 2]; V],
    weights: &[[u8; 32]; 4],
    x: &[int8x16_t; V],
) {
    let weights: [int8x16_t; 2] = must_cast(weights[usize::from(WORD)]);
    for (products, x) in products.iter_mut().zip(x) {
        for (products, weights) in products.iter_mut().zip(weights) {
            *products = dot_lane::<WORD>(*products, weights, *x);
        }
    }
}

/// Word `i` of four rows, for each `i`.
#[target_feature(enable = "neon")]
#[inline]
fn transpose(rows: [uint32x4_t; 4]) -> [uint8x16_t; 4] {
    let [a, b, c, d] = rows;
    let pairs = |low, high| [vzip1q_u32(low, high), vzip2q_u32(low, high)].map(|pair| vreinterpretq_u64_u32(pair));
    let ([ab_0, ab_1], [cd_0, cd_1]) = (pairs(a, b), pairs(c, d));
    [vzip1q_u64(ab_0, cd_0), vzip2q_u64(ab_0, cd_0), vzip1q_u64(ab_1, cd_1), vzip2q_u64(ab_1, cd_1)]
        .map(|words| vreinterpretq_u8_u64(words))
}
