//! Conversions between elements, f32, codes and activations.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`: the CPU must have NEON")]

use core::arch::aarch64::*;

use bytemuck::must_cast;
use half::{bf16, f16};

use super::Neon;
use super::codes::{codes_in_order, look_up_f32, look_up_u16, nearest_codes, pack_codes, u16_planes};
use super::registers::{F32x8, add, load_f32, mul, prefetch, store_f32};
use crate::format::CODEBOOK;
use crate::isa::simd::bits::{bits, bits_mut};
use crate::isa::simd::steps::{Decode, Floats, Lanes, Widen};
use crate::spec::SPAN;

impl Lanes for Neon {
    type Lanes = F32x8;

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(&self, lanes: &[f32; 8]) -> F32x8 {
        load_f32(lanes)
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn store(&self, out: &mut [f32; 8], lanes: F32x8) {
        store_f32(out, lanes);
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add_lanes(&self, [low, high]: F32x8) -> f32 {
        let four = vaddq_f32(low, high);
        vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }

    #[inline(always)]
    fn prefetch<T>(&self, data: &[T], ahead: usize) {
        prefetch(data, ahead);
    }
}

impl Floats for Neon {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn splat(&self, x: f32) -> F32x8 {
        [vdupq_n_f32(x); 2]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn add(&self, a: F32x8, b: F32x8) -> F32x8 {
        add(a, b)
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn mul(&self, a: F32x8, b: F32x8) -> F32x8 {
        mul(a, b)
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn max_abs(&self, largest: F32x8, x: F32x8) -> F32x8 {
        let max = |i: usize| vmaxq_u32(vreinterpretq_u32_f32(largest[i]), abs_bits(x[i]));
        [vreinterpretq_f32_u32(max(0)), vreinterpretq_f32_u32(max(1))]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn largest_bits(&self, [low, high]: F32x8) -> u32 {
        vmaxvq_u32(vmaxq_u32(vreinterpretq_u32_f32(low), vreinterpretq_u32_f32(high)))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn encode(&self, weights: [F32x8; 4], inverse: f32) -> [u8; 16] {
        let codes = |x: float32x4_t| nearest_codes(vmulq_n_f32(x, inverse));
        must_cast(pack_codes(weights.map(|[low, high]| [codes(low), codes(high)])))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn arrange_i16(&self, x: [F32x8; 8], out: &mut [i16; SPAN]) {
        let q = x.map(|[a, b]| {
            let [a, b] = [vcvtnq_s32_f32(a), vcvtnq_s32_f32(b)];
            vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b))
        });
        // Of each half of the span every second column, twice.
        for (q, out) in q.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let ([even_0, odd_0], [even_1, odd_1]) = (split(q[0], q[1]), split(q[2], q[3]));
            let ([a, c], [b, d]) = (split(even_0, even_1), split(odd_0, odd_1));
            *out = must_cast([a, b, c, d]);
        }
    }
}

impl Widen<f32> for Neon {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn widen(&self, x: &[f32; 8]) -> F32x8 {
        load_f32(x)
    }
}

impl Widen<f16> for Neon {
    /// NaN and subnormals included: the exponent is moved by a product with 2^112.
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn widen(&self, x: &[f16; 8]) -> F32x8 {
        let bits: uint16x8_t = must_cast(*bits(x));
        let magnitude = vandq_u16(bits, vdupq_n_u16(0x7fff));
        let special = vandq_u16(vcgtq_u16(magnitude, vdupq_n_u16(0x7bff)), vdupq_n_u16(0x7f80));
        let top = shift_to_top(vorrq_u16(veorq_u16(bits, magnitude), special));
        let join = |magnitude: uint32x4_t, top: float32x4_t| {
            let scaled = vmulq_n_f32(vreinterpretq_f32_u32(magnitude), f32::from_bits((127 + 112) << 23));
            vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), vreinterpretq_u32_f32(top)))
        };
        let low = vshll_n_u16::<13>(vget_low_u16(magnitude));
        [join(low, top[0]), join(vshll_high_n_u16::<13>(magnitude), top[1])]
    }
}

impl Widen<bf16> for Neon {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn widen(&self, x: &[bf16; 8]) -> F32x8 {
        shift_to_top(must_cast(*bits(x)))
    }
}

impl Decode<f32> for Neon {
    /// The absmax: the weights are looked up and multiplied.
    type Book = F32x8;

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> F32x8 {
        [vdupq_n_f32(absmax); 2]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode(&self, absmax: &F32x8, packed: &[u8; 16], out: &mut [f32; 32]) {
        for (codes, out) in codes_in_order(packed).into_iter().zip(out.as_chunks_mut::<16>().0) {
            let [a, b, c, d] = look_up_f32(codes, &self.f32_planes);
            *out = must_cast([mul([a, b], *absmax), mul([c, d], *absmax)]);
        }
    }
}

impl Decode<f16> for Neon {
    /// The bytes of the sixteen products, which are rounded once for the block.
    type Book = [uint8x16_t; 2];

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> [uint8x16_t; 2] {
        let (book, absmax) = (CODEBOOK.as_chunks().0, [vdupq_n_f32(absmax); 2]);
        u16_planes([0, 1].map(|i| round_f16(mul(load_f32(&book[i]), absmax))))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode(&self, book: &[uint8x16_t; 2], packed: &[u8; 16], out: &mut [f16; 32]) {
        *bits_mut(out) = must_cast(codes_in_order(packed).map(|codes| look_up_u16(codes, book)));
    }
}

impl Decode<bf16> for Neon {
    /// As for f16.
    type Book = [uint8x16_t; 2];

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> [uint8x16_t; 2] {
        let (book, absmax) = (CODEBOOK.as_chunks().0, [vdupq_n_f32(absmax); 2]);
        u16_planes([0, 1].map(|i| round_bf16(mul(load_f32(&book[i]), absmax))))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn decode(&self, book: &[uint8x16_t; 2], packed: &[u8; 16], out: &mut [bf16; 32]) {
        *bits_mut(out) = must_cast(codes_in_order(packed).map(|codes| look_up_u16(codes, book)));
    }
}

/// Bits of the absolute values.
#[target_feature(enable = "neon")]
#[inline]
fn abs_bits(x: float32x4_t) -> uint32x4_t {
    vreinterpretq_u32_f32(vabsq_f32(x))
}

/// The even and the odd elements.
#[target_feature(enable = "neon")]
#[inline]
fn split(a: int16x8_t, b: int16x8_t) -> [int16x8_t; 2] {
    [vuzp1q_s16(a, b), vuzp2q_s16(a, b)]
}

/// Eight f32 whose upper 16 bits are given, the others 0.
#[target_feature(enable = "neon")]
#[inline]
fn shift_to_top(x: uint16x8_t) -> F32x8 {
    [vshll_n_u16::<16>(vget_low_u16(x)), vshll_high_n_u16::<16>(x)].map(|x| vreinterpretq_f32_u32(x))
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: the intrinsic for it came with Rust 1.94, after
/// the oldest Rust that this crate supports.
#[target_feature(enable = "neon")]
#[inline]
fn round_f16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = abs_bits(x);
        let sign = vshrq_n_u32::<16>(vbicq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fff_ffff)));
        // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go; it takes the carry.
        let odd = vandq_u32(vshrq_n_u32::<13>(bits), vdupq_n_u32(1));
        let bias = vdupq_n_u32(0xfff_u32.wrapping_sub((127 - 15) << 23));
        let normal = vshrq_n_u32::<13>(vaddq_u32(vaddq_u32(bits, bias), odd));
        // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
        let half = vdupq_n_f32(0.5);
        let sum = vaddq_f32(vreinterpretq_f32_u32(bits), half);
        let subnormal = vsubq_u32(vreinterpretq_u32_f32(sum), vreinterpretq_u32_f32(half));
        let is_subnormal = vcltq_u32(bits, vdupq_n_u32(113 << 23));
        // From 2^16 on the exponent would run past infinity.
        let finite = vminq_u32(normal, vdupq_n_u32(0x7c00));
        vorrq_u32(vbslq_u32(is_subnormal, subnormal, finite), sign)
    };
    narrow_u16([rounded(x[0]), rounded(x[1])])
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[target_feature(enable = "neon")]
#[inline]
fn round_bf16(x: F32x8) -> uint16x8_t {
    let rounded = |x: float32x4_t| {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        vreinterpretq_u16_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd))
    };
    // The upper halves.
    vuzp2q_u16(rounded(x[0]), rounded(x[1]))
}

/// Eight 32-bit integers below 2^16 as 16-bit integers.
#[target_feature(enable = "neon")]
#[inline]
fn narrow_u16(x: [uint32x4_t; 2]) -> uint16x8_t {
    let [low, high] = x.map(|x| vreinterpretq_u16_u32(x));
    vuzp1q_u16(low, high)
}
