//! The steps of the transposed 16x4 product: eight columns in two registers. A multiplication takes one row, whose input is
//! an element of a register.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON")]

use core::arch::aarch64::*;

use bytemuck::must_cast;

use super::Neon;
use super::codes::{codes_in_order, look_up_u16, u16_planes};
use super::registers::{F32x8, load_f32, mul};
use crate::format::CODEBOOK;
use crate::gradients::Gradients;
use crate::isa::simd::steps::Steps;
use crate::isa::simd::steps_transposed_16x4::{IntegerColumns, Near, RowPair};
use crate::isa::simd::transposed_16x4;
use crate::spec::{HALF_SPAN, SPAN};

impl IntegerColumns for Neon {
    type Sums = [int32x4_t; 2];
    /// The first row, and the second.
    type Weights = [int16x8_t; 2];
    type Pair = int16x4_t;
    /// Low and high bytes of each.
    type Books = [[uint8x16_t; 2]; 2];

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn books(&self, factors: [f32; 2]) -> [[uint8x16_t; 2]; 2] {
        [planes(factors[0]), planes(factors[1])]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode_pair(&self, books: &[[uint8x16_t; 2]; 2], packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair) {
        for (row, out) in out.as_chunks_mut::<HALF_SPAN>().0.iter_mut().enumerate() {
            let [first, second] = codes_in_order(packed[row]);
            *out = must_cast([look_up_u16(first, &books[row]), look_up_u16(second, &books[row])]);
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn no_sums(&self) -> [int32x4_t; 2] {
        [vdupq_n_s32(0); 2]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load_weights(&self, rows: &RowPair, register: usize) -> [int16x8_t; 2] {
        let registers = rows.as_chunks::<8>().0;
        [must_cast(registers[register]), must_cast(registers[HALF_SPAN / 8 + register])]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn splat_pair(&self, values: &[i16; 2]) -> int16x4_t {
        vreinterpret_s16_s32(vdup_n_s32(must_cast(*values)))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_products(&self, sums: [int32x4_t; 2], [a, b]: [int16x8_t; 2], x: int16x4_t) -> [int32x4_t; 2] {
        let low = vmlal_lane_s16::<0>(sums[0], vget_low_s16(a), x);
        let high = vmlal_high_lane_s16::<0>(sums[1], a, x);
        [vmlal_lane_s16::<1>(low, vget_low_s16(b), x), vmlal_high_lane_s16::<1>(high, b, x)]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn sums_to_f32(&self, sums: [int32x4_t; 2]) -> F32x8 {
        [vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1])]
    }

    #[target_feature(enable = "neon")]
    #[inline(never)]
    unsafe fn add_vectors<const N: usize>(
        steps: &Steps<Self>,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    ) {
        if N == 4 {
            transposed_16x4::add_vectors::<Self, N, 1>(steps, near, gradients, first, sums);
        } else {
            transposed_16x4::add_vectors::<Self, N, 2>(steps, near, gradients, first, sums);
        }
    }
}

/// The bytes of the codebook times a factor, rounded.
#[target_feature(enable = "neon")]
#[inline]
fn planes(factor: f32) -> [uint8x16_t; 2] {
    let book = CODEBOOK.as_chunks().0;
    u16_planes([rounded(&book[0], factor), rounded(&book[1], factor)])
}

/// Eight numbers times a factor, rounded to integers of 16 bits.
#[target_feature(enable = "neon")]
#[inline]
fn rounded(x: &[f32; 8], factor: f32) -> uint16x8_t {
    let [low, high] = mul(load_f32(x), [vdupq_n_f32(factor); 2]);
    let (low, high) = (vcvtnq_s32_f32(low), vcvtnq_s32_f32(high));
    vuzp1q_u16(vreinterpretq_u16_s32(low), vreinterpretq_u16_s32(high))
}
