//! The functions of the table: each compiles a loop for NEON.

#![expect(unsafe_code, reason = "proves that the CPU has what these functions are compiled for")]

use bytemuck::must_cast;

use super::Neon;
use super::dotprod::Dotprod;
use super::i8mm::I8mm;
use super::steps_8x8::{Plain, book};
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

#[target_feature(enable = "neon")]
#[inline]
fn steps() -> Steps<Neon> {
    let (i16_planes, f32_planes) = (must_cast(PLANES_I16), must_cast(PLANES_F32));
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(Neon { i16_planes, f32_planes }) }
}

#[target_feature(enable = "neon")]
#[inline]
fn steps_8x8() -> Steps<Plain> {
    let book = book();
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(Plain { book }) }
}

#[target_feature(enable = "neon,dotprod")]
#[inline]
fn steps_dotprod() -> Steps<Dotprod> {
    let book = book();
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(Dotprod { book }) }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
#[inline]
fn steps_i8mm() -> Steps<I8mm> {
    let book = book();
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(I8mm { book }) }
}

/// What exists for each type of elements.
pub(super) const fn floats<T: Float>() -> FloatTable<T>
where
    Neon: Widen<T> + Decode<T>,
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

#[target_feature(enable = "neon")]
fn quantize<T: Float>(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32])
where
    Neon: Widen<T>,
{
    quantize::quantize(&steps(), weights, block_size, packed, absmax);
}

#[target_feature(enable = "neon")]
fn dequantize<T: Float>(matrix: &Nf4Matrix<'_>, out: &mut [T])
where
    Neon: Decode<T>,
{
    dequantize::dequantize(&steps(), matrix, out);
}

#[target_feature(enable = "neon")]
fn quantize_activations<T: Float>(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32])
where
    Neon: Widen<T>,
{
    activations::quantize_activations(&steps(), inputs, group, values, scales);
}

#[target_feature(enable = "neon")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    product_16x4::gemv(&steps(), matrix, activations, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    batch_16x4::gemm(&steps(), matrix, activations, out);
}

#[target_feature(enable = "neon")]
fn quantize_activations_8x8<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32])
where
    Neon: Widen<T>,
{
    activations::quantize_activations_8x8(&steps(), &steps_8x8(), inputs, values, scales);
}

#[target_feature(enable = "neon")]
pub(super) fn gemv_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps_8x8(), matrix, activations, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps_8x8(), matrix, activations, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn gemv_8x8_dotprod(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps_dotprod(), matrix, activations, out);
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn gemm_8x8_dotprod(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps_dotprod(), matrix, activations, out);
}

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn gemm_8x8_i8mm(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps_i8mm(), matrix, activations, out);
}

#[target_feature(enable = "neon")]
fn gemv_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Neon: Widen<T>,
{
    product_f32::gemv_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "neon")]
fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Neon: Widen<T>,
{
    product_f32::gemm_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_f32::gemv_transposed_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_transposed::gemm_transposed_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm_dense_add(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]) {
    product_columns::gemm_dense_add(&steps(), a, x, batch, factor, out);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
    product_transposed::gemm_transposed_dense_add(&steps(), a, x, batch, out);
}

#[target_feature(enable = "neon")]
fn gemv_dense<T: Float>(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32])
where
    Neon: Widen<T>,
{
    product_dense::gemv_dense(&steps(), a, x, add, out);
}

#[target_feature(enable = "neon")]
fn gemm_dense<T: Float>(a: &[T], x: &[f32], batch: usize, out: &mut [f32])
where
    Neon: Widen<T>,
{
    product_dense::gemm_dense(&steps(), a, x, batch, out);
}

#[target_feature(enable = "neon")]
pub(super) fn quantize_gradients(inputs: &[f32], rows: usize, values: &mut [i16], scales: &mut [f32]) {
    scalar::transposed_16x4::quantize_gradients(inputs, rows, values, scales);
}

#[target_feature(enable = "neon")]
pub(super) fn gemm_transposed(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]) {
    transposed_16x4::gemm_transposed(&steps(), matrix, gradients, out);
}
