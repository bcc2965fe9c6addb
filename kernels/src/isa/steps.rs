//! What the instruction sets with vectors do themselves for the products; `products.rs` and `products_f32.rs` do the rest.
//!
//! All is inlined into functions of the instruction set, so nothing here has features of its own.

#![allow(dead_code, reason = "only instruction sets with vectors take a span at once")]

use crate::activations::{Activations, SPAN};
use crate::matrix::Nf4Matrix;

/// The eight lanes of a row.
pub(super) trait Vectors {
    type Lanes: Copy;

    fn load(&self, lanes: &[f32; 8]) -> Self::Lanes;

    fn store(&self, out: &mut [f32; 8], lanes: Self::Lanes);

    /// [`crate::spec::add_lanes`].
    fn add_lanes(&self, lanes: Self::Lanes) -> f32;

    /// Asks for the cache line `ahead` bytes after the start of `bytes`, theirs or not. A hint, which reads nothing.
    fn prefetch(&self, bytes: &[u8], ahead: usize);
}

/// The 16x4 products.
pub(super) trait Steps16x4: Vectors {
    /// Vectors of a batch that share the weights of a decoded span: eight, or four where there are no registers for more.
    const VECTORS: usize;

    /// Adds the products of the weights of a span, which has `GROUPS` activation groups, and `N` vectors to their lanes.
    fn add_span<const GROUPS: usize, const N: usize>(
        &self,
        lanes: [Self::Lanes; N],
        packed: &[u8; SPAN / 2],
        values: &[[i16; SPAN]; N],
        absmax: &[f32; GROUPS],
        scales: &[[f32; GROUPS]; N],
    ) -> [Self::Lanes; N];

    /// [`super::products::gemm_vectors`], in a function of its own: so the stack holds the tile of one `N` at a time.
    fn gemm_vectors<const GROUPS: usize, const N: usize>(
        &self,
        matrix: &Nf4Matrix<'_>,
        activations: &Activations<'_>,
        first: usize,
        out: &mut [f32],
    );
}

/// The f32 products. Inputs and decoded weights of a span have one order, which the instruction set chooses: that of
/// [`crate::spec::F32_SLOTS`], or with fewer lanes at a time.
pub(super) trait StepsF32: Vectors {
    /// Rows of a batch product that share the loads of the inputs, four or two.
    const ROWS: usize;
    /// Where each column of a span stands in that order.
    const SLOTS: [u8; SPAN];

    /// Puts the inputs of a span into order.
    fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]);

    /// Adds the products of a span, which has `GROUPS` blocks at most, and inputs in order to the lanes.
    fn add_span_f32<const GROUPS: usize>(
        &self,
        lanes: Self::Lanes,
        packed: &[u8; SPAN / 2],
        inputs: &[f32; SPAN],
        absmax: &[f32; GROUPS],
    ) -> Self::Lanes;

    /// The weights of a span in order, without absmax.
    fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]);

    /// Adds the weights of a span of four rows, times their factors, to the sums of the columns, which are in order.
    fn add_four<const GROUPS: usize>(
        &self,
        packed: [&[u8; SPAN / 2]; 4],
        factors: [&[f32; GROUPS]; 4],
        sums: &mut [f32; SPAN],
    );

    /// Adds the products of `R` decoded rows, which share the loads of the inputs, and a vector to their lanes.
    fn add_rows<const GROUPS: usize, const R: usize>(
        &self,
        rows: &[DecodedRow<GROUPS>; R],
        inputs: &[[f32; SPAN]],
        lanes: &mut [[f32; 8]; R],
    );
}

/// Spans of a [`DecodedRow`].
pub(super) const DECODED_SPANS: usize = 16;

/// The decoded weights of a part of a row, and the absmax of their blocks.
#[repr(align(64))]
pub(super) struct DecodedRow<const GROUPS: usize> {
    pub(super) weights: [[f32; SPAN]; DECODED_SPANS],
    pub(super) absmax: [[f32; GROUPS]; DECODED_SPANS],
}

/// Implements the traits for the token of an instruction set, which only code that has its features can make, by the
/// functions of the same names around it; and makes from them the products of its table.
#[allow(unused_macros, reason = "only instruction sets with vectors use it")]
macro_rules! implement_steps {
    (
        $token:ident, $features:literal,
        lanes: $lanes:ty, vectors: $vectors:literal, rows: $rows:literal, slots: $slots:expr
    ) => {
        use $crate::activations::{Activations, SPAN};
        use $crate::isa::steps::{DecodedRow, Steps16x4, StepsF32, Vectors};
        use $crate::isa::{products, products_f32};
        use $crate::matrix::Nf4Matrix;

        /// The 16x4 product.
        #[target_feature(enable = $features)]
        pub(super) fn gemv(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
            products::gemv(&$token::new(), matrix, activations, out);
        }

        /// The 16x4 product of a batch.
        #[target_feature(enable = $features)]
        pub(super) fn gemm(matrix: &Nf4Matrix<'_>, activations: &Activations<'_>, out: &mut [f32]) {
            products::gemm(&$token::new(), matrix, activations, out);
        }

        /// The f32 product.
        #[target_feature(enable = $features)]
        pub(super) fn gemv_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
            products_f32::gemv_f32(&$token::new(), matrix, inputs, out);
        }

        /// The f32 product of a batch.
        #[target_feature(enable = $features)]
        pub(super) fn gemm_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
            products_f32::gemm_f32(&$token::new(), matrix, inputs, out);
        }

        /// The f32 product with the transposed matrix.
        #[target_feature(enable = $features)]
        pub(super) fn gemv_transposed_f32(matrix: &Nf4Matrix<'_>, inputs: &[f32], out: &mut [f32]) {
            products_f32::gemv_transposed_f32(&$token::new(), matrix, inputs, out);
        }

        #[target_feature(enable = $features)]
        #[inline(never)]
        fn gemm_vectors<const GROUPS: usize, const N: usize>(
            steps: &$token,
            matrix: &Nf4Matrix<'_>,
            activations: &Activations<'_>,
            first: usize,
            out: &mut [f32],
        ) {
            products::gemm_vectors::<$token, GROUPS, N>(steps, matrix, activations, first, out);
        }

        #[allow(unused_unsafe, reason = "calls of functions with features are safe on WebAssembly")]
        impl Vectors for $token {
            type Lanes = $lanes;

            #[inline(always)]
            fn load(&self, lanes: &[f32; 8]) -> $lanes {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { load_f32(lanes) }
            }

            #[inline(always)]
            fn store(&self, out: &mut [f32; 8], lanes: $lanes) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { store_f32(out, lanes) }
            }

            #[inline(always)]
            fn add_lanes(&self, lanes: $lanes) -> f32 {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { add_lanes(lanes) }
            }

            #[inline(always)]
            fn prefetch(&self, bytes: &[u8], ahead: usize) {
                prefetch(bytes, ahead);
            }
        }

        #[allow(unused_unsafe, reason = "calls of functions with features are safe on WebAssembly")]
        impl Steps16x4 for $token {
            const VECTORS: usize = $vectors;

            #[inline(always)]
            fn add_span<const GROUPS: usize, const N: usize>(
                &self,
                lanes: [$lanes; N],
                packed: &[u8; SPAN / 2],
                values: &[[i16; SPAN]; N],
                absmax: &[f32; GROUPS],
                scales: &[[f32; GROUPS]; N],
            ) -> [$lanes; N] {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { add_span(&self.i16_planes, lanes, packed, values, absmax, scales) }
            }

            fn gemm_vectors<const GROUPS: usize, const N: usize>(
                &self,
                matrix: &Nf4Matrix<'_>,
                activations: &Activations<'_>,
                first: usize,
                out: &mut [f32],
            ) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { gemm_vectors::<GROUPS, N>(self, matrix, activations, first, out) }
            }
        }

        #[allow(unused_unsafe, reason = "calls of functions with features are safe on WebAssembly")]
        impl StepsF32 for $token {
            const ROWS: usize = $rows;
            const SLOTS: [u8; SPAN] = $slots;

            #[inline(always)]
            fn arrange(&self, inputs: &[f32; SPAN], out: &mut [f32; SPAN]) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { arrange(inputs, out) }
            }

            #[inline(always)]
            fn add_span_f32<const GROUPS: usize>(
                &self,
                lanes: $lanes,
                packed: &[u8; SPAN / 2],
                inputs: &[f32; SPAN],
                absmax: &[f32; GROUPS],
            ) -> $lanes {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { add_span_f32(&self.f32_planes, lanes, packed, inputs, absmax) }
            }

            #[inline(always)]
            fn decode_f32(&self, packed: &[u8; SPAN / 2], out: &mut [f32; SPAN]) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { decode_f32(&self.f32_planes, packed, out) }
            }

            #[inline(always)]
            fn add_four<const GROUPS: usize>(
                &self,
                packed: [&[u8; SPAN / 2]; 4],
                factors: [&[f32; GROUPS]; 4],
                sums: &mut [f32; SPAN],
            ) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { add_four(&self.f32_planes, packed, factors, sums) }
            }

            #[inline(always)]
            fn add_rows<const GROUPS: usize, const R: usize>(
                &self,
                rows: &[DecodedRow<GROUPS>; R],
                inputs: &[[f32; SPAN]],
                lanes: &mut [[f32; 8]; R],
            ) {
                // SAFETY: the processor has the features, for `self` exists.
                unsafe { add_rows(rows, inputs, lanes) }
            }
        }
    };
}
#[allow(unused_imports, reason = "only instruction sets with vectors use it")]
pub(super) use implement_steps;
