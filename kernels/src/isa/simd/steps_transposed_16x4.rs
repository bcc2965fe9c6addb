//! The steps of the transposed 16x4 product: integer arithmetic on columns, as many as a register of f32 holds.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use core::ops::Range;

use super::steps::Steps;
use super::steps_transposed::Columns;
use crate::gradients::Gradients;
use crate::spec::{HALF_SPAN, ROW_GROUP, SPAN};

/// Two rows of half a span, in an order of the instruction set.
pub(in crate::isa) type RowPair = [i16; 2 * HALF_SPAN];

/// Some groups of half a panel.
pub(in crate::isa) struct Near<'a> {
    pub(super) weights: &'a [[RowPair; ROW_GROUP / 2]],
    pub(super) scales: &'a [f32],
    pub(super) groups: Range<usize>,
    pub(super) half: usize,
}

/// Integers in registers, whose lanes are the columns of [`Columns`].
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait IntegerColumns: Columns + Sized {
    /// Exact sums of columns.
    type Sums: Copy;
    /// The weights of two rows.
    type Weights: Copy;
    /// The values of a vector in two rows.
    type Pair: Copy;

    /// What the sixteen codes stand for in two rows.
    type Books: Copy;

    /// The books of two rows: the entries of [`crate::CODEBOOK`] times the factor of the row, rounded.
    unsafe fn books(&self, factors: [f32; 2]) -> Self::Books;

    /// The weights of two rows of half a span.
    unsafe fn decode_pair(&self, books: &Self::Books, packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair);

    unsafe fn no_sums(&self) -> Self::Sums;

    /// Columns `register * COLUMNS..` of the half of the span.
    unsafe fn load_weights(&self, rows: &RowPair, register: usize) -> Self::Weights;

    unsafe fn splat_pair(&self, values: &[i16; 2]) -> Self::Pair;

    unsafe fn add_products(&self, sums: Self::Sums, weights: Self::Weights, values: Self::Pair) -> Self::Sums;

    unsafe fn sums_to_f32(&self, sums: Self::Sums) -> Self::Columns;

    /// The loop [`super::transposed_16x4::add_vectors`] in a function that is not inlined, so that all registers are its own,
    /// with as many columns as they hold of `N` vectors.
    unsafe fn add_vectors<const N: usize>(
        steps: &Steps<Self>,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    );
}

impl<S: IntegerColumns> Steps<S> {
    #[inline(always)]
    pub(super) fn books(&self, factors: [f32; 2]) -> S::Books {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().books(factors) }
    }

    #[inline(always)]
    pub(super) fn decode_pair(&self, books: &S::Books, packed: [&[u8; HALF_SPAN / 2]; 2], out: &mut RowPair) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().decode_pair(books, packed, out) }
    }

    #[inline(always)]
    pub(super) fn no_sums(&self) -> S::Sums {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().no_sums() }
    }

    #[inline(always)]
    pub(super) fn load_weights(&self, rows: &RowPair, register: usize) -> S::Weights {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().load_weights(rows, register) }
    }

    #[inline(always)]
    pub(super) fn splat_pair(&self, values: &[i16; 2]) -> S::Pair {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().splat_pair(values) }
    }

    #[inline(always)]
    pub(super) fn add_pair_products(&self, sums: S::Sums, weights: S::Weights, values: S::Pair) -> S::Sums {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { IntegerColumns::add_products(self.get(), sums, weights, values) }
    }

    #[inline(always)]
    pub(super) fn sums_to_f32(&self, sums: S::Sums) -> S::Columns {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().sums_to_f32(sums) }
    }

    #[inline(always)]
    pub(super) fn add_vectors<const N: usize>(
        &self,
        near: &Near<'_>,
        gradients: &Gradients<'_>,
        first: usize,
        sums: &mut [[f32; SPAN]; N],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { S::add_vectors(self, near, gradients, first, sums) }
    }
}
