//! The steps of the f32 products.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use super::steps::{Lanes, Steps};
use crate::spec::SPAN;

/// The steps of the f32 products. Inputs and decoded weights of a span have one order, which the instruction set
/// chooses: that of [`crate::spec::F32_SLOTS`], or with fewer lanes at a time.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait StepsF32: Lanes {
    /// Rows of a batch product that share the loads of the inputs, four or two.
    const ROWS: usize;
    /// Where each column of a span stands in that order.
    const SLOTS: [u8; SPAN];

    /// Puts the inputs of a span into order.
    unsafe fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]);

    /// Adds the products of a span, which has `GROUPS` blocks at most, and inputs in order to the lanes.
    unsafe fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: Self::Lanes,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> Self::Lanes;

    /// The weights of a span in order, without absmax.
    unsafe fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]);

    /// Adds the weights of a span of four rows, times their factors, to the sums of the columns, which are in order.
    unsafe fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    );

    /// Adds the products of `R` decoded rows, which share the loads of the inputs, and a vector to their lanes.
    unsafe fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
        rows: &[DecodedRow<GROUPS>; R],
        inputs: &[[f32; SPAN]],
        lanes: &mut [[f32; 8]; R],
    );
}

/// Spans of a [`DecodedRow`].
pub(in crate::isa) const DECODED_SPANS: usize = 8;

/// The decoded weights of a part of a row, and the absmax of their blocks.
#[repr(align(64))]
pub(in crate::isa) struct DecodedRow<const GROUPS: usize> {
    pub(in crate::isa) weights: [[f32; SPAN]; DECODED_SPANS],
    pub(in crate::isa) absmax: [[f32; GROUPS]; DECODED_SPANS],
}

impl<S: StepsF32> Steps<S> {
    #[inline(always)]
    pub(super) fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().arrange(inputs, out) }
    }

    #[inline(always)]
    pub(super) fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: S::Lanes,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_span_f32(lanes, packed, inputs, absmax) }
    }

    #[inline(always)]
    pub(super) fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().decode_f32(packed, out) }
    }

    #[inline(always)]
    pub(super) fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_four(packed, factors, sums) }
    }

    #[inline(always)]
    pub(super) fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
        rows: &[DecodedRow<GROUPS>; R],
        inputs: &[[f32; SPAN]],
        lanes: &mut [[f32; 8]; R],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_rows(rows, inputs, lanes) }
    }
}
