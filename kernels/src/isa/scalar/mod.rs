//! Portable code: any CPU, and the reference for the others.
//!
//! The last block of a tensor if it is partial, blocks that straddle rows and rests shorter than a register are handled
//! here for every instruction set.

pub(super) mod activations;
pub(super) mod conversions;
pub(super) mod product_16x4;
pub(super) mod product_8x8;
pub(super) mod product_dense;
pub(super) mod product_f32;
pub(super) mod product_transposed;
pub(super) mod transposed_16x4;

use super::table::{FloatTable, Isa, Table};
use crate::double_quant;
use crate::float::Float;

pub(super) static TABLE: Table = Table {
    isa: Isa::Scalar,
    slots: &activations::SLOTS,
    f32: floats(),
    f16: floats(),
    bf16: floats(),
    mean: double_quant::mean,
    quantize_absmax: double_quant::quantize_absmax,
    gemv: product_16x4::gemv,
    gemm: product_16x4::gemm,
    slots_8x8: &activations::SLOTS,
    gemv_8x8: product_8x8::gemv,
    gemm_8x8: product_8x8::gemm,
    gemv_transposed_f32: product_transposed::gemv_transposed_f32,
    gemm_transposed_f32: product_transposed::gemm_transposed_f32,
    quantize_gradients: transposed_16x4::quantize_gradients,
    gemm_transposed: transposed_16x4::gemm_transposed,
    gemm_dense_add: product_dense::gemm_dense_add,
    gemm_transposed_dense_add: product_transposed::gemm_transposed_dense_add,
};

/// What exists for each type of elements.
const fn floats<T: Float>() -> FloatTable<T> {
    FloatTable {
        quantize: conversions::quantize,
        dequantize: conversions::dequantize,
        quantize_activations: activations::quantize_activations,
        quantize_activations_8x8: activations::quantize_activations_8x8,
        gemv_f32: product_f32::gemv_f32,
        gemm_f32: product_f32::gemm_f32,
        gemv_dense: product_dense::gemv_dense,
        gemm_dense: product_dense::gemm_dense,
    }
}
