//! The steps of the transposed products of a batch: arithmetic on columns, as many as a register holds.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use super::steps::{Decode, Floats, Steps};
use crate::spec::SPAN;

/// Columns in registers. Every instruction set with [`Floats`] has them, eight at a time.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Columns: Decode<f32> {
    type Columns: Copy;

    /// Columns of a register: a divisor of half a span.
    const COLUMNS: usize;

    /// Columns `register * COLUMNS..` of a span.
    unsafe fn load_columns(&self, span: &[f32; SPAN], register: usize) -> Self::Columns;

    unsafe fn store_columns(&self, span: &mut [f32; SPAN], register: usize, columns: Self::Columns);

    unsafe fn splat_columns(&self, x: f32) -> Self::Columns;

    unsafe fn add_columns(&self, a: Self::Columns, b: Self::Columns) -> Self::Columns;

    unsafe fn mul_columns(&self, a: Self::Columns, b: Self::Columns) -> Self::Columns;
}

impl<S: Floats + Decode<f32>> Columns for S {
    type Columns = S::Lanes;

    const COLUMNS: usize = 8;

    #[inline(always)]
    unsafe fn load_columns(&self, span: &[f32; SPAN], register: usize) -> S::Lanes {
        // SAFETY: the caller's CPU has the instruction set.
        unsafe { self.load(&span.as_chunks().0[register]) }
    }

    #[inline(always)]
    unsafe fn store_columns(&self, span: &mut [f32; SPAN], register: usize, columns: S::Lanes) {
        // SAFETY: the caller's CPU has the instruction set.
        unsafe { self.store(&mut span.as_chunks_mut().0[register], columns) }
    }

    #[inline(always)]
    unsafe fn splat_columns(&self, x: f32) -> S::Lanes {
        // SAFETY: the caller's CPU has the instruction set.
        unsafe { self.splat(x) }
    }

    #[inline(always)]
    unsafe fn add_columns(&self, a: S::Lanes, b: S::Lanes) -> S::Lanes {
        // SAFETY: the caller's CPU has the instruction set.
        unsafe { self.add(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_columns(&self, a: S::Lanes, b: S::Lanes) -> S::Lanes {
        // SAFETY: the caller's CPU has the instruction set.
        unsafe { self.mul(a, b) }
    }
}

impl<S: Columns> Steps<S> {
    #[inline(always)]
    pub(super) fn load_columns(&self, span: &[f32; SPAN], register: usize) -> S::Columns {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().load_columns(span, register) }
    }

    #[inline(always)]
    pub(super) fn store_columns(&self, span: &mut [f32; SPAN], register: usize, columns: S::Columns) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().store_columns(span, register, columns) }
    }

    #[inline(always)]
    pub(super) fn splat_columns(&self, x: f32) -> S::Columns {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().splat_columns(x) }
    }

    #[inline(always)]
    pub(super) fn add_columns(&self, a: S::Columns, b: S::Columns) -> S::Columns {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_columns(a, b) }
    }

    #[inline(always)]
    pub(super) fn mul_columns(&self, a: S::Columns, b: S::Columns) -> S::Columns {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().mul_columns(a, b) }
    }
}
