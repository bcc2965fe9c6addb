//! The steps of the transposed products: sixteen columns in a register. Codes are decoded as by AVX2.

#![expect(unsafe_code, reason = "the steps of a trait are `unsafe fn`, and the entries prove that the CPU has AVX-512")]

use core::arch::x86_64::*;

use super::Avx512;
use super::registers::{load_f32, store_f32};
use crate::isa::avx2::Avx2;
use crate::isa::simd::steps::Decode;
use crate::isa::simd::steps_transposed::Columns;
use crate::spec::SPAN;

impl Decode<f32> for Avx512 {
    type Book = <Avx2 as Decode<f32>>::Book;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn book(&self, absmax: f32) -> Self::Book {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { Decode::<f32>::book(&self.avx2, absmax) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn decode(&self, book: &Self::Book, packed: &[u8; 16], out: &mut [f32; 32]) {
        // SAFETY: the caller's CPU has AVX2.
        unsafe { Decode::<f32>::decode(&self.avx2, book, packed, out) }
    }
}

impl Columns for Avx512 {
    type Columns = __m512;

    const COLUMNS: usize = 16;

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load_columns(&self, span: &[f32; SPAN], register: usize) -> __m512 {
        load_f32(&span.as_chunks().0[register])
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store_columns(&self, span: &mut [f32; SPAN], register: usize, columns: __m512) {
        store_f32(&mut span.as_chunks_mut().0[register], columns);
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn splat_columns(&self, x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn add_columns(&self, a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn mul_columns(&self, a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
}
