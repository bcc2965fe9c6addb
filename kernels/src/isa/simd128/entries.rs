//! The functions of the table: each compiles a loop for WebAssembly SIMD.

#![expect(unsafe_code, reason = "proves that the target has what these functions are compiled for")]

use bytemuck::must_cast;

use super::Simd128;
use crate::activations::{Activations, Activations8x8};
use crate::float::Float;
use crate::gradients::Gradients;
use crate::isa::scalar;
use crate::isa::simd::planes::{PLANES_F32, PLANES_I16};
use crate::isa::simd::steps::{Decode, Steps, Widen};
use crate::isa::simd::{
    activations, batch_8x8, batch_16x4, dequantize, product_8x8, product_16x4, product_columns, product_dense,
    product_f32, product_transposed, quantize, transposed_16x4,
};
use crate::isa::table::FloatTable;
use crate::matrix::Nf4Matrix;
use crate::spec::CODEBOOK_I8;

#[inline]
fn steps() -> Steps<Simd128> {
    let (i16_planes, i8_book, f32_planes) = (must_cast(PLANES_I16), must_cast(CODEBOOK_I8), must_cast(PLANES_F32));
    // SAFETY: this is compiled only for targets that have the features of all steps.
    unsafe { Steps::new(Simd128 { i16_planes, i8_book, f32_planes }) }
}

/// What exists for each type of elements.
pub(super) const fn floats<T: Float>() -> FloatTable<T>
where
    Simd128: Widen<T> + Decode<T>,
{
    FloatTable {
        quantize,
        dequantize,
        quantize_activations,
        quantize_activations_8x8,
        gemv_f32,
        gemm_f32,
        gemv_dense,
        gemm_dense,
    }
}

fn quantize<T: Float>(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32])
where
    Simd128: Widen<T>,
{
    quantize::quantize(&steps(), weights, block_size, packed, absmax);
}

fn dequantize<T: Float>(matrix: &Nf4Matrix<'_>, out: &mut [T])
where
    Simd128: Decode<T>,
{
    dequantize::dequantize(&steps(), matrix, out);
}

fn quantize_activations<T: Float>(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32])
where
    Simd128: Widen<T>,
{
    activations::quantize_activations(&steps(), inputs, group, values, scales);
}

pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    product_16x4::gemv(&steps(), matrix, activations, out);
}

pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    batch_16x4::gemm(&steps(), matrix, activations, out);
}

fn quantize_activations_8x8<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32])
where
    Simd128: Widen<T>,
{
    activations::quantize_activations_8x8(&steps(), &steps(), inputs, values, scales);
}

pub(super) fn gemv_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps(), matrix, activations, out);
}

pub(super) fn gemm_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps(), matrix, activations, out);
}

fn gemv_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Simd128: Widen<T>,
{
    product_f32::gemv_f32(&steps(), matrix, inputs, out);
}

fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Simd128: Widen<T>,
{
    product_f32::gemm_f32(&steps(), matrix, inputs, out);
}

pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_f32::gemv_transposed_f32(&steps(), matrix, inputs, out);
}

pub(super) fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_transposed::gemm_transposed_f32(&steps(), matrix, inputs, out);
}

pub(super) fn gemm_dense_add(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]) {
    product_columns::gemm_dense_add(&steps(), a, x, batch, factor, out);
}

pub(super) fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
    product_transposed::gemm_transposed_dense_add(&steps(), a, x, batch, out);
}

fn gemv_dense<T: Float>(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32])
where
    Simd128: Widen<T>,
{
    product_dense::gemv_dense(&steps(), a, x, add, out);
}

fn gemm_dense<T: Float>(a: &[T], x: &[f32], batch: usize, out: &mut [f32])
where
    Simd128: Widen<T>,
{
    product_dense::gemm_dense(&steps(), a, x, batch, out);
}

pub(super) fn quantize_gradients(inputs: &[f32], rows: usize, values: &mut [i16], scales: &mut [f32]) {
    scalar::transposed_16x4::quantize_gradients(inputs, rows, values, scales);
}

pub(super) fn gemm_transposed(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]) {
    transposed_16x4::gemm_transposed(&steps(), matrix, gradients, out);
}
