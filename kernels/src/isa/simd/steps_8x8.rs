//! The steps of the 8x8 product. Each is an inner loop, over the spans of some columns.

#![expect(unsafe_code, reason = "declares steps that not every CPU can run, and calls them where this one is known to")]

use super::product_16x4;
use super::steps::Steps;
use crate::spec::SPAN;

/// Rows of a panel.
pub(in crate::isa) const ROWS: usize = 32;

/// Spans of a panel: 16 KB of decoded weights.
pub(in crate::isa) const SPANS: usize = 8;

/// Vectors whose activations stand together.
pub(in crate::isa) const VECTORS: usize = 8;

/// The decoded weights of a span of a panel, where four columns of each row stand together, sixteen times.
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "its instruction sets want other orders"))]
pub(in crate::isa) type Weights = [[u8; 4 * ROWS]; 16];

/// A span of a panel: the decoded weights of some rows, and the absmax of their two groups.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(in crate::isa) struct PanelSpan<W> {
    pub weights: W,
    pub absmax: [[f32; ROWS]; 2],
}

/// A span of some vectors, and what belongs to its two groups.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(in crate::isa) struct VectorSpan {
    pub values: [[i8; SPAN]; VECTORS],
    pub scales: [[f32; VECTORS]; 2],
    /// [`Steps8x8::starts`].
    pub starts: [[i32; VECTORS]; 2],
}

/// The two sums of a vector in the rows of a panel.
pub(in crate::isa) type Sums = [[f32; ROWS]; 2];

/// Of each of four rows the packed bytes of some spans.
pub(in crate::isa) type Quad<'a> = [&'a [[u8; SPAN / 2]]; 4];

/// Of some spans the absmax of four rows: one of each row for both groups, or one for each.
pub(in crate::isa) type QuadAbsmax<'a, const GROUPS: usize> = &'a [[[f32; 4]; GROUPS]];

/// The sums of four rows: of their even groups, then of their odd ones.
pub(in crate::isa) type QuadSums = [f32; 8];

/// The first elements of each slice. Without features of its own, so that its closure is inlined: the compiler does not
/// inline one with features into the function of the standard library that calls it.
#[inline(always)]
pub(in crate::isa) fn trimmed<T>([a, b, c, d]: [&[T]; 4], len: usize) -> [&[T]; 4] {
    [&a[..len], &b[..len], &c[..len], &d[..len]]
}

/// Values and scales of some vectors, which the compiler then knows to be as many.
#[allow(dead_code, reason = "for instruction sets that multiply several vectors at once")]
#[inline(always)]
pub(in crate::isa) fn trimmed_vectors<'a, const N: usize>(
    values: [&'a [[i8; SPAN]]; N],
    scales: [&'a [[f32; 2]]; N],
) -> ([&'a [[i8; SPAN]]; N], [&'a [[f32; 2]]; N]) {
    let spans = values[0].len();
    (values.map(|values| &values[..spans]), scales.map(|scales| &scales[..spans]))
}

/// The steps of the 8x8 product.
///
/// # Safety
/// Every method needs a CPU with the instruction set.
pub(in crate::isa) trait Steps8x8: Sized {
    /// How many times four rows a vector is multiplied with at once outside of panels: once or twice.
    const QUADS: usize;

    /// The largest batch for which rows are decoded into registers; larger ones have panels.
    const FEW: usize;

    /// How many bytes ahead of their use [`Self::add_quads`] prefetches packed bytes, at least.
    const AHEAD: usize = product_16x4::AHEAD;

    /// The decoded weights of a span of a panel, in the order of the instruction set: [`Weights`], or what else it likes.
    type Weights: Copy;

    /// What a panel holds before it is filled.
    const EMPTY: Self::Weights;

    /// The values of a span of up to 127, from the order of the 16x4 product to that of this one.
    unsafe fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]);

    /// What the sums of products of each group start with. Where the weights of a panel are larger by 128, because an
    /// instruction multiplies unsigned by signed integers, it is minus 128 times the sum of the activations; elsewhere zero.
    #[inline]
    unsafe fn starts(&self, _values: &[[i8; SPAN]; VECTORS]) -> [[i32; VECTORS]; 2] {
        [[0; VECTORS]; 2]
    }

    /// Decodes a span of the rows of a panel. Prefetches the packed bytes that are `ahead` bytes further.
    unsafe fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], ahead: usize, out: &mut Self::Weights);

    /// Adds the products of a panel with the first `N` vectors, two, four or eight, to their sums.
    unsafe fn add_panel<const N: usize>(
        &self,
        panel: &[PanelSpan<Self::Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    );

    /// Adds the products of some rows with `N` vectors, up to four, to their sums: as many spans as `values` has. Prefetches
    /// the packed bytes that are `ahead` bytes further.
    unsafe fn add_quads<const GROUPS: usize, const Q: usize, const N: usize>(
        &self,
        packed: [Quad<'_>; Q],
        values: [&[[i8; SPAN]]; N],
        absmax: [QuadAbsmax<'_, GROUPS>; Q],
        scales: [&[[f32; 2]]; N],
        ahead: usize,
        sums: &mut [[QuadSums; Q]; N],
    );
}

impl<S: Steps8x8> Steps<S> {
    #[inline(always)]
    pub(super) fn narrow(&self, values: &[i16; SPAN], out: &mut [i8; SPAN]) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().narrow(values, out) }
    }

    #[inline(always)]
    pub(super) fn starts(&self, values: &[[i8; SPAN]; VECTORS]) -> [[i32; VECTORS]; 2] {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().starts(values) }
    }

    #[inline(always)]
    pub(super) fn decode_rows(&self, packed: [&[u8; SPAN / 2]; ROWS], ahead: usize, out: &mut S::Weights) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().decode_rows(packed, ahead, out) }
    }

    #[inline(always)]
    pub(super) fn add_panel_8x8<const N: usize>(
        &self,
        panel: &[PanelSpan<S::Weights>],
        vectors: &[VectorSpan],
        sums: &mut [Sums; VECTORS],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_panel::<N>(panel, vectors, sums) }
    }

    #[inline(always)]
    pub(super) fn add_quads<const GROUPS: usize, const Q: usize, const N: usize>(
        &self,
        packed: [Quad<'_>; Q],
        values: [&[[i8; SPAN]]; N],
        absmax: [QuadAbsmax<'_, GROUPS>; Q],
        scales: [&[[f32; 2]]; N],
        ahead: usize,
        sums: &mut [[QuadSums; Q]; N],
    ) {
        // SAFETY: `self` proves that the CPU has the instruction set.
        unsafe { self.get().add_quads(packed, values, absmax, scales, ahead, sums) }
    }
}
