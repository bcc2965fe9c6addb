//! The functions of the table: each compiles a loop for AVX2.

#![expect(unsafe_code, reason = "proves that the CPU has what these functions are compiled for")]

use core::arch::x86_64::{_mm_sfence, _mm256_broadcastsi128_si256};

use bytemuck::must_cast;

use super::Avx2;
use super::codes::f32_planes;
use super::conversions::Streaming;
use crate::activations::{Activations, Activations8x8};
use crate::float::Float;
use crate::gradients::Gradients;
use crate::isa::scalar;
use crate::isa::simd::planes::{PLANES_I16, UNSIGNED_BOOK_I8};
use crate::isa::simd::steps::{Decode, Steps, Widen};
use crate::isa::simd::{
    activations, batch_8x8, batch_16x4, dequantize, product_8x8, product_16x4, product_columns, product_dense,
    product_f32, product_transposed, quantize, transposed_16x4,
};
use crate::isa::table::FloatTable;
use crate::matrix::Nf4Matrix;
use crate::spec::CODEBOOK_I8;

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(in crate::isa) fn avx2<const VNNI: bool>() -> Avx2<VNNI> {
    let i16_planes = PLANES_I16.map(|plane| _mm256_broadcastsi128_si256(must_cast(plane)));
    let i8_book = if VNNI { must_cast(UNSIGNED_BOOK_I8) } else { must_cast(CODEBOOK_I8) };
    Avx2 { i16_planes, i8_book: _mm256_broadcastsi128_si256(i8_book), f32_planes: f32_planes() }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn steps() -> Steps<Avx2> {
    let steps = avx2();
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(steps) }
}

#[target_feature(enable = "avx2,f16c,avxvnni")]
#[inline]
fn steps_vnni() -> Steps<Avx2<true>> {
    let steps = avx2();
    // SAFETY: this function has the features of all steps.
    unsafe { Steps::new(steps) }
}

/// What exists for each type of elements.
pub(super) const fn floats<T: Float>() -> FloatTable<T>
where
    Avx2: Widen<T> + Decode<T>,
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

#[target_feature(enable = "avx2,f16c")]
fn quantize<T: Float>(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32])
where
    Avx2: Widen<T>,
{
    quantize::quantize(&steps(), weights, block_size, packed, absmax);
}

#[target_feature(enable = "avx2,f16c")]
fn dequantize<T: Float>(matrix: &Nf4Matrix<'_>, out: &mut [T])
where
    Avx2: Decode<T>,
{
    dequantize::dequantize(&steps(), matrix, out);
}

/// From this size on the weights as f32 are written past the caches: what does not fit in them would first be read, and
/// gone before it is used. Measured on a core with 32 MB of last cache: 1.2 times as fast for 64 MB, 0.9 times for 16
/// MB; weights of 16 bits do not gain.
const STREAM_BYTES: usize = 32 << 20;

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize_f32(matrix: &Nf4Matrix<'_>, out: &mut [f32]) {
    if size_of_val(out) < STREAM_BYTES {
        dequantize(matrix, out);
    } else {
        let steps = Streaming(avx2());
        // SAFETY: this function has the features of all steps, and the fence comes before anything else uses `out`.
        let steps = unsafe { Steps::new(steps) };
        dequantize::dequantize(&steps, matrix, out);
        _mm_sfence();
    }
}

#[target_feature(enable = "avx2,f16c")]
fn quantize_activations<T: Float>(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32])
where
    Avx2: Widen<T>,
{
    activations::quantize_activations(&steps(), inputs, group, values, scales);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    product_16x4::gemv(&steps(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    if activations.batch() == 1 {
        return gemv(matrix, activations, out);
    }
    batch_16x4::gemm(&steps(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c,avxvnni")]
pub(super) fn gemv_vnni(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    product_16x4::gemv(&steps_vnni(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c,avxvnni")]
pub(super) fn gemm_vnni(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
    batch_16x4::gemm(&steps_vnni(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c")]
fn quantize_activations_8x8<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32])
where
    Avx2: Widen<T>,
{
    activations::quantize_activations_8x8(&steps(), &steps(), inputs, values, scales);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemv_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm_8x8(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c,avxvnni")]
pub(super) fn gemv_8x8_vnni(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    product_8x8::multiply(&steps_vnni(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c,avxvnni")]
pub(super) fn gemm_8x8_vnni(matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>, out: &mut [f32]) {
    batch_8x8::gemm(&steps_vnni(), matrix, activations, out);
}

#[target_feature(enable = "avx2,f16c")]
fn gemv_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Avx2: Widen<T>,
{
    product_f32::gemv_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(in crate::isa) fn gemm_f32<T: Float>(matrix: &Nf4Matrix<'_>, inputs: &[T], out: &mut [f32])
where
    Avx2: Widen<T>,
{
    product_f32::gemm_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_f32::gemv_transposed_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
    product_transposed::gemm_transposed_f32(&steps(), matrix, inputs, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm_dense_add(a: &[f32], x: &[f32], batch: usize, factor: f32, out: &mut [f32]) {
    product_columns::gemm_dense_add(&steps(), a, x, batch, factor, out);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm_transposed_dense_add(a: &[f32], x: &[f32], batch: usize, out: &mut [f32]) {
    product_transposed::gemm_transposed_dense_add(&steps(), a, x, batch, out);
}

#[target_feature(enable = "avx2,f16c")]
fn gemv_dense<T: Float>(a: &[T], x: &[f32], add: Option<f32>, out: &mut [f32])
where
    Avx2: Widen<T>,
{
    product_dense::gemv_dense(&steps(), a, x, add, out);
}

#[target_feature(enable = "avx2,f16c")]
fn gemm_dense<T: Float>(a: &[T], x: &[f32], batch: usize, out: &mut [f32])
where
    Avx2: Widen<T>,
{
    product_dense::gemm_dense(&steps(), a, x, batch, out);
}

#[target_feature(enable = "avx2")]
pub(super) fn quantize_gradients(inputs: &[f32], rows: usize, values: &mut [i16], scales: &mut [f32]) {
    scalar::transposed_16x4::quantize_gradients(inputs, rows, values, scales);
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn gemm_transposed(matrix: &Nf4Matrix<'_>, gradients: &Gradients<'_>, out: &mut [f32]) {
    transposed_16x4::gemm_transposed(&steps(), matrix, gradients, out);
}
