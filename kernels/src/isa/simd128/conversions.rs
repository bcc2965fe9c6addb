//! Conversions between elements, f32, codes and activations.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, here too, where the target has what they need")]

use core::arch::wasm32::*;

use bytemuck::must_cast;
use half::{bf16, f16};

use super::Simd128;
use super::codes::{codes_in_order, look_up_f32, look_up_u16, nearest_codes, pack_codes, u16_planes, zip_u16};
use super::registers::{F32x8, add, load_f32, mul, store_f32};
use crate::format::CODEBOOK;
use crate::isa::simd::bits::{bits, bits_mut};
use crate::isa::simd::steps::{Decode, Floats, Lanes, Widen};
use crate::spec::SPAN;

impl Lanes for Simd128 {
    type Lanes = F32x8;

    #[inline]
    unsafe fn load(&self, lanes: &[f32; 8]) -> F32x8 {
        load_f32(lanes)
    }

    #[inline]
    unsafe fn store(&self, out: &mut [f32; 8], lanes: F32x8) {
        store_f32(out, lanes);
    }

    #[inline]
    unsafe fn add_lanes(&self, [low, high]: F32x8) -> f32 {
        let four = f32x4_add(low, high);
        let two = f32x4_add(four, i32x4_shuffle::<2, 3, 0, 1>(four, four));
        f32x4_extract_lane::<0>(two) + f32x4_extract_lane::<1>(two)
    }

    /// WebAssembly has no such hint.
    #[inline(always)]
    fn prefetch<T>(&self, _data: &[T], _ahead: usize) {}
}

impl Floats for Simd128 {
    #[inline]
    unsafe fn splat(&self, x: f32) -> F32x8 {
        [f32x4_splat(x); 2]
    }

    #[inline]
    unsafe fn add(&self, a: F32x8, b: F32x8) -> F32x8 {
        add(a, b)
    }

    #[inline]
    unsafe fn mul(&self, a: F32x8, b: F32x8) -> F32x8 {
        mul(a, b)
    }

    #[inline]
    unsafe fn max_abs(&self, largest: F32x8, x: F32x8) -> F32x8 {
        [u32x4_max(largest[0], abs_bits(x[0])), u32x4_max(largest[1], abs_bits(x[1]))]
    }

    #[inline]
    unsafe fn largest_bits(&self, [low, high]: F32x8) -> u32 {
        let x = u32x4_max(low, high);
        let x = u32x4_max(x, i32x4_shuffle::<2, 3, 0, 1>(x, x));
        u32x4_extract_lane::<0>(x).max(u32x4_extract_lane::<1>(x))
    }

    #[inline]
    unsafe fn encode(&self, weights: [F32x8; 4], inverse: f32) -> [u8; 16] {
        let codes = |x: v128| nearest_codes(f32x4_mul(x, f32x4_splat(inverse)));
        must_cast(pack_codes(weights.map(|[low, high]| [codes(low), codes(high)])))
    }

    #[inline]
    unsafe fn arrange_i16(&self, x: [F32x8; 8], out: &mut [i16; SPAN]) {
        let (q, pieces) = (x.map(round_i16), out.as_chunks_mut::<8>().0);
        for (i, q) in q.as_chunks::<2>().0.iter().enumerate() {
            pieces[i] = must_cast(i16x8_shuffle::<0, 2, 4, 6, 8, 10, 12, 14>(q[0], q[1]));
            pieces[i + 4] = must_cast(i16x8_shuffle::<1, 3, 5, 7, 9, 11, 13, 15>(q[0], q[1]));
        }
    }
}

impl Widen<f32> for Simd128 {
    #[inline]
    unsafe fn widen(&self, x: &[f32; 8]) -> F32x8 {
        load_f32(x)
    }
}

impl Widen<f16> for Simd128 {
    /// NaN and subnormals included: the exponent is moved by a product with 2^112.
    #[inline]
    unsafe fn widen(&self, x: &[f16; 8]) -> F32x8 {
        let bits: v128 = must_cast(*bits(x));
        let magnitude = v128_and(bits, u16x8_splat(0x7fff));
        let special = v128_and(i16x8_gt(magnitude, i16x8_splat(0x7bff)), u16x8_splat(0x7f80));
        let top = shift_to_top(v128_or(v128_xor(bits, magnitude), special));
        let scale = f32x4_splat(f32::from_bits((127 + 112) << 23));
        let join = |magnitude: v128, top: v128| v128_or(f32x4_mul(u32x4_shl(magnitude, 13), scale), top);
        [join(u32x4_extend_low_u16x8(magnitude), top[0]), join(u32x4_extend_high_u16x8(magnitude), top[1])]
    }
}

impl Widen<bf16> for Simd128 {
    #[inline]
    unsafe fn widen(&self, x: &[bf16; 8]) -> F32x8 {
        shift_to_top(must_cast(*bits(x)))
    }
}

impl Decode<f32> for Simd128 {
    /// The absmax: the weights are looked up and multiplied.
    type Book = F32x8;

    #[inline]
    unsafe fn book(&self, absmax: f32) -> F32x8 {
        [f32x4_splat(absmax); 2]
    }

    #[inline]
    unsafe fn decode(&self, absmax: &F32x8, packed: &[u8; 16], out: &mut [f32; 32]) {
        for (codes, out) in codes_in_order(packed).into_iter().zip(out.as_chunks_mut::<16>().0) {
            let [a, b, c, d] = look_up_f32(codes, &self.f32_planes);
            *out = must_cast([mul([a, b], *absmax), mul([c, d], *absmax)]);
        }
    }
}

impl Decode<f16> for Simd128 {
    /// The bytes of the sixteen products, which are rounded once for the block.
    type Book = [v128; 2];

    #[inline]
    unsafe fn book(&self, absmax: f32) -> [v128; 2] {
        let (book, absmax) = (CODEBOOK.as_chunks().0, [f32x4_splat(absmax); 2]);
        u16_planes([0, 1].map(|i| round_f16(mul(load_f32(&book[i]), absmax))))
    }

    #[inline]
    unsafe fn decode(&self, book: &[v128; 2], packed: &[u8; 16], out: &mut [f16; 32]) {
        *bits_mut(out) = must_cast(codes_in_order(packed).map(|codes| look_up_u16(codes, book)));
    }
}

impl Decode<bf16> for Simd128 {
    /// As for f16.
    type Book = [v128; 2];

    #[inline]
    unsafe fn book(&self, absmax: f32) -> [v128; 2] {
        let (book, absmax) = (CODEBOOK.as_chunks().0, [f32x4_splat(absmax); 2]);
        u16_planes([0, 1].map(|i| round_bf16(mul(load_f32(&book[i]), absmax))))
    }

    #[inline]
    unsafe fn decode(&self, book: &[v128; 2], packed: &[u8; 16], out: &mut [bf16; 32]) {
        *bits_mut(out) = must_cast(codes_in_order(packed).map(|codes| look_up_u16(codes, book)));
    }
}

/// Bits of the absolute values.
#[inline]
fn abs_bits(x: v128) -> v128 {
    v128_and(x, u32x4_splat(0x7fff_ffff))
}

/// The nearest integers, ties to even: adding 1.5 * 2^23 leaves them in the low bits. (Converting with saturation, the
/// only conversion to integers there is, takes several instructions on x86-64.)
#[inline]
pub(super) fn round_i16(x: F32x8) -> v128 {
    let [a, b] = add(x, [f32x4_splat(12_582_912.0); 2]);
    i16x8_shuffle::<0, 2, 4, 6, 8, 10, 12, 14>(a, b)
}

/// Eight f32 whose upper 16 bits are given, the others 0.
#[inline]
fn shift_to_top(x: v128) -> F32x8 {
    zip_u16(u16x8_splat(0), x)
}

/// Eight f32 to f16, nearest even, NaN excluded. Integer arithmetic: there is no instruction for it.
#[inline]
fn round_f16(x: F32x8) -> v128 {
    let rounded = |x: v128| {
        let bits = abs_bits(x);
        let sign = u32x4_shr(v128_xor(x, bits), 16);
        // Normal: move the exponent's bias from 127 to 15 and round the 13 bits that go; it takes the carry.
        let odd = v128_and(u32x4_shr(bits, 13), u32x4_splat(1));
        let bias = u32x4_splat(0xfff_u32.wrapping_sub((127 - 15) << 23));
        let normal = u32x4_shr(u32x4_add(u32x4_add(bits, bias), odd), 13);
        // Subnormal: adding 0.5, whose last bit is worth 2^-24 as that of an f16 subnormal is, rounds in the adder.
        let half = f32x4_splat(0.5);
        let subnormal = u32x4_sub(f32x4_add(bits, half), half);
        let is_subnormal = i32x4_lt(bits, i32x4_splat(113 << 23));
        // From 2^16 on the exponent would run past infinity.
        let finite = u32x4_min(normal, u32x4_splat(0x7c00));
        v128_or(v128_bitselect(subnormal, finite, is_subnormal), sign)
    };
    u16x8_narrow_i32x4(rounded(x[0]), rounded(x[1]))
}

/// Eight f32 to bf16, nearest even, NaN excluded.
#[inline]
fn round_bf16(x: F32x8) -> v128 {
    let rounded = |bits: v128| {
        let odd = v128_and(u32x4_shr(bits, 16), u32x4_splat(1));
        u32x4_add(u32x4_add(bits, u32x4_splat(0x7fff)), odd)
    };
    // The upper halves.
    i16x8_shuffle::<1, 3, 5, 7, 9, 11, 13, 15>(rounded(x[0]), rounded(x[1]))
}
