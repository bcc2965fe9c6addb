//! What this instruction set gives to the products.

use core::arch::x86_64::*;

use super::dequantize::{f32_planes, u16_planes};
use super::products::add_span;
use super::products_f32::{add_four, add_rows, add_span_f32, arrange, decode_f32};
use super::vector::*;
use crate::isa::steps::implement_steps;
use crate::spec;

/// Tables for look-ups, in both halves. Only code that has AVX2 can make it.
pub(super) struct Avx2 {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [__m256i; 2],
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [__m256i; 4],
}

impl Avx2 {
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let planes = u16_planes(load_i16(&spec::CODEBOOK_I16));
        Self { i16_planes: planes, f32_planes: f32_planes() }
    }
}

implement_steps!(Avx2, "avx2", lanes: __m256, vectors: 8, rows: 4, slots: spec::F32_SLOTS);
