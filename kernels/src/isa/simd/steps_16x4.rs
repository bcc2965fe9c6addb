//! The steps of the 16x4 product.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use super::steps::{Lanes, Steps};
use crate::activations::Activations;
use crate::matrix::Nf4Matrix;
use crate::spec::SPAN;

/// The steps of the 16x4 product.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Steps16x4: Lanes + Sized {
    /// Vectors of a batch that share the weights of a decoded span: eight, or four where there are no registers for
    /// more.
    const VECTORS: usize;

    /// Adds the products of the weights of a span, which has `GROUPS` activation groups, and `N` vectors to their
    /// lanes.
    unsafe fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        lanes: [Self::Lanes; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [Self::Lanes; N];

    /// The loop [`super::product_16x4::gemm_vectors`], in a function that is not inlined: so the stack holds the tile
    /// of one `N` at a time.
    unsafe fn gemm_vectors<const GROUPS: usize, const N: usize>(
        steps: &Steps<Self>,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    );
}

impl<S: Steps16x4> Steps<S> {
    #[inline(always)]
    pub(super) fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        lanes: [S::Lanes; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [S::Lanes; N] {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_span(lanes, packed, values, absmax, scales) }
    }

    #[inline(always)]
    pub(super) fn gemm_vectors<const GROUPS: usize, const N: usize>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { S::gemm_vectors::<GROUPS, N>(self, matrix, activations, first, out) }
    }
}
