//! Merging the adapter into the weight.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use nf4_kernels::Float;

use super::QLoRALayer;
use crate::adapter::pair::Pair;
use crate::buffer::zeros;
use crate::error::{Error, check_len};
use crate::weight::base::Base;

/// Merge.
impl QLoRALayer {
    /// Returns the merged weight `dequantize(base) + scale * B A`, row-major `[d_out, d_in]`. With `DoRA`, each row is
    /// multiplied by its magnitude and divided by its norm, which is recomputed and so never stale.
    ///
    /// The base is exact, products and sums are f64 in the order of the rank, and each weight is rounded once to f32, so
    /// the bits are the same everywhere. One row is held in memory beside the result.
    ///
    /// # Panics
    /// If the result does not fit in memory ([`Self::merge_rows_into`] merges in parts), or if the adapter, or one of its
    /// tensors, was replaced by one that does not fit.
    #[doc(alias = "merge_and_unload")]
    #[must_use]
    pub fn merge_to_f32(&self) -> Vec<f32> {
        let mut merged = vec![0.0; self.base_weight_quantized().len()];
        self.merge_rows_into(0..self.d_out(), &mut merged).expect("all rows, and `merged` was made for them");
        merged
    }

    /// Writes some rows of the merged weight, `[rows.len(), d_in]`, to `out`, for merging in little memory.
    ///
    /// For f32 these are rows of [`Self::merge_to_f32`]; for [`f16`] and [`bf16`] they are the same values, rounded to
    /// nearest even. It allocates one row of f32 per thread.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no such rows or `out` does not have `rows.len() * d_in` values; and
    /// [those of all layers](crate#errors).
    ///
    /// [`f16`]: nf4_kernels::f16
    /// [`bf16`]: nf4_kernels::bf16
    pub fn merge_rows_into<T: Float>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), Error> {
        let count = self.linear.weight.try_view()?.row_range(rows.clone())?.rows();
        check_len("merged weights", count * self.d_in(), out.len())?;
        let merge = self.merger()?;
        let work = merge.pair.work(out.len());
        self.linear.executor.by_rows(work, rows, self.d_in(), out, &|rows: Range<usize>, out: &mut [T]| {
            let mut merged = zeros(1, self.d_in())?;
            for (row, out) in rows.zip(out.chunks_mut(self.d_in().max(1))) {
                merge.row(row, &mut merged)?;
                out.iter_mut().zip(&merged).for_each(|(o, m)| *o = T::from_f32(*m));
            }
            Ok(())
        })
    }

    /// Base and adapter, if they fit each other.
    pub(super) fn merger(&self) -> Result<Merger<'_>, Error> {
        let base = self.linear.base()?;
        Ok(Merger { pair: self.adapter.pair(&base)?, base })
    }
}

/// A base and an adapter that fit each other.
pub(super) struct Merger<'a> {
    base: Base<'a>,
    pair: Pair<'a>,
}

impl Merger<'_> {
    /// One row of [`QLoRALayer::merge_to_f32`].
    pub(super) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        self.base.row(row, out)?;
        self.pair.merge_row(row, out);
        Ok(())
    }
}
