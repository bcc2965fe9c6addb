//! The steps of the transposed 16x4 product: eight columns in two registers, of two rows.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, because other CPUs must have what they use")]

use core::arch::wasm32::*;

use bytemuck::must_cast;

use super::Simd128;
use super::codes::{codes_in_order, look_up_u16, u16_planes, zip_u16};
use super::conversions::round_i16;
use super::registers::{F32x8, load_f32, mul};
use crate::format::CODEBOOK;
use crate::gradients::Gradients;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_transposed_16x4::{IntegerColumns, Near, RowPair};
use crate::isa::simd::transposed_16x4;
use crate::spec::{HALF_SPAN, SPAN};

impl IntegerColumns for Simd128 {
    type Sums = [v128; 2];
    type Weights = [v128; 2];
    type Pair = v128;
    /// Low and high bytes of each.
    type Books = [[v128; 2]; 2];

    #[inline]
    unsafe fn books(&self, factors: [f32; 2]) -> [[v128; 2]; 2] {
        factors.map(planes)
    }

    #[inline]
    unsafe fn decode_pair(&self, books: &[[v128; 2]; 2], packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair) {
        let (first, second) = (codes_in_order(packed[0]), codes_in_order(packed[1]));
        for (i, out) in out.as_chunks_mut::<HALF_SPAN>().0.iter_mut().enumerate() {
            let ([a, b], [c, d]) = (look_up_u16(first[i], &books[0]), look_up_u16(second[i], &books[1]));
            *out = must_cast([zip_u16(a, c), zip_u16(b, d)]);
        }
    }

    #[inline]
    unsafe fn no_sums(&self) -> [v128; 2] {
        [i32x4_splat(0); 2]
    }

    #[inline]
    unsafe fn load_weights(&self, rows: &RowPair, register: usize) -> [v128; 2] {
        must_cast(rows.as_chunks::<16>().0[register])
    }

    #[inline]
    unsafe fn splat_pair(&self, values: &[i16; 2]) -> v128 {
        i32x4_splat(must_cast(*values))
    }

    #[inline]
    unsafe fn add_products(&self, sums: [v128; 2], weights: [v128; 2], x: v128) -> [v128; 2] {
        [i32x4_add(sums[0], i32x4_dot_i16x8(weights[0], x)), i32x4_add(sums[1], i32x4_dot_i16x8(weights[1], x))]
    }

    #[inline]
    unsafe fn sums_to_f32(&self, sums: [v128; 2]) -> F32x8 {
        [f32x4_convert_i32x4(sums[0]), f32x4_convert_i32x4(sums[1])]
    }

    #[inline(never)]
    unsafe fn add_vectors<const N: usize>(
        steps: &Steps<Self>,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    ) {
        transposed_16x4::add_vectors::<Self, N, 1>(steps, near, gradients, first, sums);
    }
}

/// The bytes of the codebook times a factor, rounded.
#[inline]
fn planes(factor: f32) -> [v128; 2] {
    let (book, factor) = (CODEBOOK.as_chunks().0, [f32x4_splat(factor); 2]);
    u16_planes([0, 1].map(|i| round_i16(mul(load_f32(&book[i]), factor))))
}
