//! What instruction sets with vector registers share: all loops over rows, columns, blocks and batches.
//!
//! A loop is a generic function that takes the [`steps::Steps`] of an instruction set `S`. The entries of a table are
//! functions with `#[target_feature]`; each calls one loop, which is inlined into it together with the steps, so that
//! all is compiled for the instruction set. Nothing here has features of its own, and the loops are safe code.

pub(super) mod absmax;
pub(super) mod activations;
pub(super) mod batch_16x4;
pub(super) mod batch_8x8;
pub(super) mod bits;
pub(super) mod dequantize;
pub(super) mod panel_16x4;
pub(super) mod planes;
pub(super) mod product_16x4;
pub(super) mod product_8x8;
pub(super) mod product_columns;
pub(super) mod product_dense;
pub(super) mod product_f32;
pub(super) mod product_transposed;
pub(super) mod quantize;
pub(super) mod steps;
pub(super) mod steps_16x4;
pub(super) mod steps_8x8;
pub(super) mod steps_f32;
pub(super) mod steps_transposed;
pub(super) mod steps_transposed_16x4;
pub(super) mod transposed_16x4;
