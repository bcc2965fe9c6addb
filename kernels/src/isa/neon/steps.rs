//! What this instruction set gives to the products.

use core::arch::aarch64::*;

use super::dequantize::{f32_planes, u16_planes};
use super::products::add_span;
use super::products_f32::{SLOTS, add_four, add_rows, add_span_f32, arrange, decode_f32};
use super::vector::*;
use crate::isa::steps::implement_steps;
use crate::spec;

/// Tables for look-ups. Only code that has NEON can make it.
pub(super) struct Neon {
    /// The two bytes of each entry of the 16x4 codebook.
    i16_planes: [uint8x16_t; 2],
    /// The four bytes of each entry of the f32 codebook.
    f32_planes: [uint8x16_t; 4],
}

impl Neon {
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        let (book, _) = spec::CODEBOOK_I16.as_chunks();
        let planes = u16_planes([0, 1].map(|i| vreinterpretq_u16_s16(load_i16(&book[i]))));
        Self { i16_planes: planes, f32_planes: f32_planes() }
    }
}

// With eight vectors the compiler makes a loop over them, whose lanes are then in memory; with four rows it runs out of
// registers.
implement_steps!(Neon, "neon", lanes: F32x8, vectors: 4, rows: 2, slots: SLOTS);
