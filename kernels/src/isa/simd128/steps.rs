//! What this instruction set gives to the products.

use core::arch::wasm32::*;

use super::dequantize::{f32_planes, u16_planes};
use super::products::add_span;
use super::products_f32::{add_four, add_rows, add_span_f32, arrange, decode_f32};
use super::vector::*;
use crate::isa::steps::implement_steps;
use crate::spec;

/// Tables for look-ups.
pub(super) struct Simd128 {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [v128; 2],
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [v128; 4],
}

impl Simd128 {
    fn new() -> Self {
        let (book, _) = spec::CODEBOOK_I16.as_chunks();
        let planes = u16_planes([load_i16(&book[0]), load_i16(&book[1])]);
        Self { i16_planes: planes, f32_planes: f32_planes() }
    }
}

// The lanes of eight vectors are in memory on an engine with 16 registers; four were slower all the same.
implement_steps!(Simd128, "simd128", lanes: F32x8, vectors: 8, rows: 2, slots: spec::F32_SLOTS);
