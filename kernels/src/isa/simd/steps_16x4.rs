//! The steps of the 16x4 product.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use super::steps::{Lanes, Steps};
use crate::activations::Activations;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// Rows of a panel: their lanes are in registers.
pub(super) const PANEL_ROWS: usize = 8;

/// Spans of a panel: 16 KB of decoded weights.
pub(super) const PANEL_SPANS: usize = 16;

/// The lanes of a vector in the rows of a panel.
pub(in crate::isa) type PanelLanes = [[f32; 8]; PANEL_ROWS];

/// Decoded weights of a tile of the matrix, span by span.
#[repr(align(64))]
pub(in crate::isa) struct Panel<const GROUPS: usize> {
    pub(super) weights: [[[i16; SPAN]; PANEL_ROWS]; PANEL_SPANS],
    pub(super) absmax: [[[f32; GROUPS]; PANEL_ROWS]; PANEL_SPANS],
}

/// The steps of the 16x4 product.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Steps16x4: Lanes + Sized {
    /// Vectors of a batch that share the weights of a decoded span: eight, or four where there are no registers for
    /// more.
    const VECTORS: usize;

    /// The 64 values of a span in registers, weights or activations.
    type Span: Copy;

    unsafe fn load_span(&self, values: &[i16; SPAN]) -> Self::Span;

    /// The weights of a span, in the order of the activations.
    unsafe fn decode_span(&self, packed: &[u8; SPAN / 2]) -> Self::Span;

    /// Adds the products of the weights of a span, which has `GROUPS` activation groups, and a vector to its lanes.
    unsafe fn add_span<const GROUPS: usize>(
        &self,
        lanes: Self::Lanes,
        weights: Self::Span,
        values: Self::Span,
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> Self::Lanes;

    /// As [`Self::add_span`], with the products of absmax and scale.
    unsafe fn add_products<const GROUPS: usize>(
        &self,
        lanes: Self::Lanes,
        weights: Self::Span,
        values: Self::Span,
        factors: &[f32; GROUPS],
    ) -> Self::Lanes;

    /// The loop [`super::batch_16x4::few_vectors`] in a function that is not inlined: so the stack holds the tile of one
    /// `N` at a time.
    unsafe fn few_vectors<const GROUPS: usize, const N: usize>(
        steps: &Steps<Self>,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    );
}

/// The steps of the loops in `panel_16x4.rs`.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Panels16x4: Steps16x4 {
    unsafe fn store_span(&self, out: &mut [i16; SPAN], span: Self::Span);

    /// The loop [`super::panel_16x4::add_panel`] in a function that is not inlined, so that all registers are its own.
    unsafe fn add_panel<const GROUPS: usize>(
        steps: &Steps<Self>,
        panel: &Panel<GROUPS>,
        values: &[[i16; SPAN]],
        scales: &[f32],
        ahead: usize,
        lanes: &mut PanelLanes,
    );
}

impl<S: Steps16x4> Steps<S> {
    #[inline(always)]
    pub(super) fn load_span(&self, values: &[i16; SPAN]) -> S::Span {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().load_span(values) }
    }

    #[inline(always)]
    pub(super) fn decode_span(&self, packed: &[u8; SPAN / 2]) -> S::Span {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().decode_span(packed) }
    }

    #[inline(always)]
    pub(super) fn add_span<const GROUPS: usize>(
        &self,
        lanes: S::Lanes,
        weights: S::Span,
        values: S::Span,
        absmax: &[f32; GROUPS],
        scales: &[f32; GROUPS],
    ) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_span(lanes, weights, values, absmax, scales) }
    }

    #[inline(always)]
    pub(super) fn add_products<const GROUPS: usize>(
        &self,
        lanes: S::Lanes,
        weights: S::Span,
        values: S::Span,
        factors: &[f32; GROUPS],
    ) -> S::Lanes {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_products(lanes, weights, values, factors) }
    }

    #[inline(always)]
    pub(super) fn few_vectors<const GROUPS: usize, const N: usize>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { S::few_vectors::<GROUPS, N>(self, matrix, activations, first, out) }
    }
}

impl<S: Panels16x4> Steps<S> {
    #[inline(always)]
    pub(super) fn store_span(&self, out: &mut [i16; SPAN], span: S::Span) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().store_span(out, span) }
    }

    #[inline(always)]
    pub(super) fn add_panel<const GROUPS: usize>(
        &self,
        panel: &Panel<GROUPS>,
        values: &[[i16; SPAN]],
        scales: &[f32],
        ahead: usize,
        lanes: &mut PanelLanes,
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { S::add_panel(self, panel, values, scales, ahead, lanes) }
    }
}
