//! The steps of the 8x8 product by 16-bit products, and what all steps of the 8x8 product share.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::codes::split_codes;
use super::registers::{load_f32x4, prefetch, store_f32x4};
use crate::isa::simd::steps_8x8::{
    PanelSpan, Quad, QuadAbsmax, QuadSums, ROWS, Steps8x8, Sums, VECTORS, VectorSpan, trimmed,
};
use crate::spec::{CODEBOOK_I8, GROUP_8X8, SPAN};

/// The even and the odd columns of a group: weights of a row, or activations.
pub(super) type Group = [int8x16_t; 2];

/// The 8x8 codebook.
pub(super) type Book = int8x16_t;

/// How a CPU multiplies weights that it decodes.
///
/// # Safety
/// The method needs a CPU with the instruction set.
pub(super) trait AddGroup {
    /// Adds the products of a group in four rows, of which each has 16 packed bytes, and a vector.
    unsafe fn add_group(
        &self,
        total: float32x4_t,
        rows: [&[u8; GROUP_8X8 / 2]; 4],
        x: Group,
        absmax: float32x4_t,
        scale: f32,
    ) -> float32x4_t;
}

/// NEON without more.
pub(super) struct Plain {
    pub(super) book: Book,
}

impl AddGroup for Plain {
    #[target_feature(enable = "neon")]
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
            *products = dot(decode(must_cast(*row), self.book), x);
        }
        finish(total, add_across(products), absmax, scale)
    }
}

impl Steps8x8 for Plain {
    const QUADS: usize = 1;
    const FEW: usize = 1;

    /// For each of the two groups, row by row.
    type Weights = [[[u8; GROUP_8X8]; ROWS]; 2];
    const EMPTY: Self::Weights = [[[0; GROUP_8X8]; ROWS]; 2];

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
            for (packed, out) in packed.iter().zip(out) {
                *out = must_cast(decode(must_cast(packed.as_chunks::<16>().0[group]), self.book));
            }
        }
    }

    #[target_feature(enable = "neon")]
    #[inline(never)]
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Self::Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        for four in 0..ROWS / 4 {
            add_four_rows::<0>(panel, four, vectors, sums);
            if N > 2 {
                add_four_rows::<2>(panel, four, vectors, sums);
            }
            if N > 4 {
                add_four_rows::<4>(panel, four, vectors, sums);
                add_four_rows::<6>(panel, four, vectors, sums);
            }
        }
    }

    #[target_feature(enable = "neon")]
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

/// Adds the products of four rows of a panel and two vectors, from number `FIRST` on, to their sums.
#[target_feature(enable = "neon")]
#[inline]
fn add_four_rows<const FIRST: usize>(
    panel: &[PanelSpan<<Plain as Steps8x8>::Weights>],
    four: usize,
    vectors: &[VectorSpan],
    sums: &mut [Sums; VECTORS],
) {
    for group in 0..2 {
        let mut totals = [0, 1].map(|v| load_f32x4(&sums[FIRST + v][group].as_chunks().0[four]));
        for (panel, vectors) in panel.iter().zip(vectors) {
            let rows: [Group; 4] = must_cast(panel.weights[group].as_chunks::<4>().0[four]);
            let absmax = load_f32x4(&panel.absmax[group].as_chunks().0[four]);
            for (v, total) in totals.iter_mut().enumerate() {
                let x = must_cast(vectors.values[FIRST + v].as_chunks::<GROUP_8X8>().0[group]);
                let products = add_across(rows.map(|weights| dot(weights, x)));
                *total = finish(*total, products, absmax, vectors.scales[group][FIRST + v]);
            }
        }
        for (sums, total) in sums[FIRST..].iter_mut().zip(totals) {
            store_f32x4(&mut sums[group].as_chunks_mut().0[four], total);
        }
    }
}

/// [`Steps8x8::add_quads`], for any of them.
///
/// # Safety
/// The CPU must have the instruction set of `steps`.
#[inline(always)]
pub(super) unsafe fn add_quads<S: AddGroup, const GROUPS: usize, const Q: usize, const N: usize>(
    steps: &S,
    packed: [Quad<'_>; Q],
    values: [&[[i8; SPAN]]; N],
    absmax: [QuadAbsmax<'_, GROUPS>; Q],
    scales: [&[[f32; 2]]; N],
    ahead: usize,
    sums: &mut [[QuadSums; Q]; N],
) {
    for ((values, scales), sums) in values.into_iter().zip(scales).zip(sums) {
        let spans = values.len();
        let scales = &scales[..spans];
        for ((packed, absmax), sums) in packed.into_iter().zip(absmax).zip(sums) {
            let ([a, b, c, d], absmax) = (trimmed(packed, spans), &absmax[..spans]);
            let mut totals: [float32x4_t; 2] = must_cast(*sums);
            for s in 0..spans {
                let rows = [&a[s], &b[s], &c[s], &d[s]];
                rows.iter().for_each(|row| prefetch(&row[..], ahead));
                for (group, total) in totals.iter_mut().enumerate() {
                    let block = group * GROUPS / 2;
                    let absmax = must_cast(absmax[s][block]);
                    let x = must_cast(values[s].as_chunks::<GROUP_8X8>().0[group]);
                    let rows = rows.map(|row| &row.as_chunks().0[group]);
                    // SAFETY: as for this function.
                    *total = unsafe { steps.add_group(*total, rows, x, absmax, scales[s][group]) };
                }
            }
            *sums = must_cast(totals);
        }
    }
}

/// The codebook in a register.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn book() -> Book {
    must_cast(CODEBOOK_I8)
}

/// The weights of the even and of the odd columns of 16 packed bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn decode(packed: uint8x16_t, book: Book) -> Group {
    split_codes(&must_cast(packed)).map(|codes| vqtbl1q_s8(book, codes))
}

/// The values of a span, from the order of the 16x4 product to that of this one: of every fourth column to of every
/// second.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn narrow(values: &[i16; SPAN], out: &mut [i8; SPAN]) {
    for (values, out) in values.as_chunks::<GROUP_8X8>().0.iter().zip(out.as_chunks_mut::<GROUP_8X8>().0) {
        // Of each value the low byte.
        let [a, b, c, d]: [int8x16_t; 4] = must_cast(*values);
        *out = must_cast([vtrn1q_s8(a, c), vtrn1q_s8(b, d)]);
    }
}

/// The products of a group, of which each lane has a part.
#[target_feature(enable = "neon")]
#[inline]
fn dot(weights: Group, x: Group) -> int32x4_t {
    // Two products of at most 124 * 127 fit in 16 bits.
    let low = vmull_s8(vget_low_s8(weights[0]), vget_low_s8(x[0]));
    let low = vmlal_s8(low, vget_low_s8(weights[1]), vget_low_s8(x[1]));
    let high = vmlal_high_s8(vmull_high_s8(weights[0], x[0]), weights[1], x[1]);
    vpadalq_s16(vpaddlq_s16(low), high)
}

/// The sums of the lanes of each.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_across([a, b, c, d]: [int32x4_t; 4]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
}

/// Adds the products of a group in four rows.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn finish(total: float32x4_t, products: int32x4_t, absmax: float32x4_t, scale: f32) -> float32x4_t {
    vaddq_f32(total, vmulq_f32(vcvtq_f32_s32(products), vmulq_n_f32(absmax, scale)))
}
