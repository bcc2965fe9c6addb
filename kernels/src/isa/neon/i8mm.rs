//! The steps of the 8x8 product by `smmla`, which multiplies two rows with two vectors.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON with `i8mm`")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::dotprod::Dotprod;
use super::registers::{matrix_product, prefetch, sums_before_loads};
use super::steps_8x8::{Book, add_quads, decode, narrow};
use crate::isa::simd::steps_8x8::{PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan};
use crate::spec::SPAN;

/// The weights of a group in four pairs of rows, of the even columns and of the odd ones: eight of each row, then the last
/// eight.
type EightRows = [[[u8; 16 * 4]; 2]; 2];

/// NEON with `dotprod` and `i8mm`.
pub(super) struct I8mm {
    pub(super) book: Book,
}

impl Steps8x8 for I8mm {
    const QUADS: usize = 1;
    const FEW: usize = 1;

    type Weights = [[EightRows; ROWS / 8]; 2];
    const EMPTY: Self::Weights = [[[[[0; 64]; 2]; 2]; ROWS / 8]; 2];

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
            for (pair, rows) in packed.as_chunks::<2>().0.iter().enumerate() {
                let [a, b] = rows.map(|row| decode(must_cast(row.as_chunks::<16>().0[group]), self.book));
                for ((a, b), out) in a.into_iter().zip(b).zip(&mut out[pair / 4]) {
                    for (weights, out) in interleave(a, b).into_iter().zip(out) {
                        out.as_chunks_mut::<16>().0[pair % 4] = must_cast(weights);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "neon,i8mm")]
    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Self::Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        for eight in 0..ROWS / 8 {
            if N == 2 {
                add_eight_rows::<1, 0, 0>(panel, eight, vectors, sums);
                add_eight_rows::<1, 0, 1>(panel, eight, vectors, sums);
            } else {
                add_eight_rows::<2, 0, 0>(panel, eight, vectors, sums);
                add_eight_rows::<2, 0, 1>(panel, eight, vectors, sums);
            }
            if N == 8 {
                add_eight_rows::<2, 2, 0>(panel, eight, vectors, sums);
                add_eight_rows::<2, 2, 1>(panel, eight, vectors, sums);
            }
        }
    }

    // Not inlined: beside the loops of a batch, there are too few registers for the addresses of four rows.
    #[target_feature(enable = "neon,dotprod")]
    #[inline(never)]
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
        unsafe { add_quads(&Dotprod { book: self.book }, packed, values, absmax, scales, ahead, sums) };
    }
}

/// Adds the products of eight rows of a panel and `P` pairs of vectors, from pair `FIRST` on, to their sums: of even groups
/// (`GROUP` is 0) or of odd ones, so that one half of the sums at a time takes registers.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn add_eight_rows<const P: usize, const FIRST: usize, const GROUP: usize>(
    panel: &[PanelSpan<<I8mm as Steps8x8>::Weights>],
    eight: usize,
    vectors: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    let mut totals = [[vdupq_n_f32(0.0); 4]; P];
    for (totals, sums) in totals.iter_mut().zip(&sums.as_chunks().0[FIRST..]) {
        *totals = load_pairs(sums, GROUP, eight);
    }
    for (panel, vectors) in panel.iter().zip(vectors) {
        let mut products = [[vdupq_n_s32(0); 4]; P];
        for (odd, weights) in panel.weights[GROUP][eight].iter().enumerate() {
            let mut x = [[vdupq_n_s8(0); 2]; P];
            for (x, values) in x.iter_mut().zip(&vectors.values.as_chunks::<2>().0[FIRST..]) {
                let values = [0, 1].map(|v: usize| values[v].as_chunks::<16>().0[2 * GROUP + odd]);
                *x = interleave(must_cast(values[0]), must_cast(values[1]));
            }
            for (i, weights) in weights.iter().enumerate() {
                let weights: [int8x16_t; 4] = must_cast(*weights);
                for (products, x) in products.iter_mut().zip(&x) {
                    for (products, weights) in products.iter_mut().zip(weights) {
                        *products = matrix_product(*products, weights, x[i]);
                    }
                }
            }
            // There are no registers for the next columns before.
            products.iter_mut().for_each(|products| sums_before_loads(products));
        }
        let absmax = twice(must_cast(panel.absmax[GROUP].as_chunks::<8>().0[eight]));
        let scales = &vectors.scales[GROUP].as_chunks::<2>().0[FIRST..];
        for ((totals, products), scales) in totals.iter_mut().zip(products).zip(scales) {
            let scales = vreinterpretq_f32_u64(vdupq_n_u64(must_cast(*scales)));
            for ((total, products), absmax) in totals.iter_mut().zip(products).zip(absmax) {
                *total = vaddq_f32(*total, vmulq_f32(vcvtq_f32_s32(products), vmulq_f32(absmax, scales)));
            }
        }
    }
    for (totals, sums) in totals.into_iter().zip(&mut sums.as_chunks_mut().0[FIRST..]) {
        store_pairs(sums, GROUP, eight, totals);
    }
}

/// The first eight columns of both, then the last eight.
#[target_feature(enable = "neon")]
#[inline]
fn interleave(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vzip1q_s64(a, b), vzip2q_s64(a, b)].map(|x| vreinterpretq_s8_s64(x))
}

/// Each of eight lanes twice.
#[target_feature(enable = "neon")]
#[inline]
fn twice([a, b]: [float32x4_t; 2]) -> [float32x4_t; 4] {
    [vzip1q_f32(a, a), vzip2q_f32(a, a), vzip1q_f32(b, b), vzip2q_f32(b, b)]
}

/// The sums of a group in eight rows: two rows and two vectors in each register.
#[target_feature(enable = "neon")]
#[inline]
fn load_pairs(sums: &[Sums; 2], group: usize, eight: usize) -> [float32x4_t; 4] {
    let [[a_0, a_1], [b_0, b_1]]: [[float32x4_t; 2]; 2] =
        [0, 1].map(|v| must_cast(sums[v][group].as_chunks::<8>().0[eight]));
    [vzip1q_f32(a_0, b_0), vzip2q_f32(a_0, b_0), vzip1q_f32(a_1, b_1), vzip2q_f32(a_1, b_1)]
}

/// The inverse of [`load_pairs`].
#[target_feature(enable = "neon")]
#[inline]
fn store_pairs(sums: &mut [Sums; 2], group: usize, eight: usize, [a, b, c, d]: [float32x4_t; 4]) {
    let out = [[vuzp1q_f32(a, b), vuzp1q_f32(c, d)], [vuzp2q_f32(a, b), vuzp2q_f32(c, d)]];
    for (sums, out) in sums.iter_mut().zip(out) {
        sums[group].as_chunks_mut::<8>().0[eight] = must_cast(out);
    }
}
