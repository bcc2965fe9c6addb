//! Registers: loads and stores, which are casts of arrays, and arithmetic on two at a time.

use core::arch::wasm32::*;

use bytemuck::must_cast;

/// Eight columns, or the eight lanes of a row.
pub(super) type F32x8 = [v128; 2];

#[inline]
pub(super) fn load_f32(x: &[f32; 8]) -> F32x8 {
    must_cast(*x)
}

#[inline]
pub(super) fn load_f32x4(x: &[f32; 4]) -> v128 {
    must_cast(*x)
}

#[inline]
pub(super) fn store_f32(out: &mut [f32; 8], x: F32x8) {
    *out = must_cast(x);
}

#[inline]
pub(super) fn store_f32x4(out: &mut [f32; 4], x: v128) {
    *out = must_cast(x);
}

/// One value in all lanes, or one in each half.
#[inline]
pub(super) fn spread<const GROUPS: usize>(x: &[f32; GROUPS]) -> F32x8 {
    [f32x4_splat(x[0]), f32x4_splat(x[GROUPS - 1])]
}

#[inline]
pub(super) fn add(a: F32x8, b: F32x8) -> F32x8 {
    [f32x4_add(a[0], b[0]), f32x4_add(a[1], b[1])]
}

#[inline]
pub(super) fn mul(a: F32x8, b: F32x8) -> F32x8 {
    [f32x4_mul(a[0], b[0]), f32x4_mul(a[1], b[1])]
}
