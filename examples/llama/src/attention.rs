//! Attention of grouped queries over the cached positions.
//!
//! For a query `q` at position `p`, with the keys `k` and values `v` of its head:
//!
//! ```text
//! score[i] = q . k[i]                       dense product of the kernels, i = 0..=p
//! weight[i] = e^((score[i] - max) / sqrt(d)), total = sum of them in sixteen lanes
//! out = (sum over spans of 64 positions of V[span] weight[span]) / total
//! ```
//!
//! where a span is a dense product too, added in order. Nothing depends on how many queries there are at a time.

use nf4::{Float, Kernels, ShapeError};

use crate::cache::{Cache, Head, SPAN};
use crate::math::exp_scores;

/// A query and where its keys and values are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    /// Positions that it attends to: its own and those before.
    pub(crate) positions: usize,
    pub(crate) values: &'a [f32],
}

impl Query<'_> {
    /// The output of the head. `scratch` has [`scratch_len`] values.
    pub(crate) fn attend(self, kernels: Kernels, scratch: &mut [f32], out: &mut [f32]) -> Result<(), ShapeError> {
        match self.cache.head(self.layer, self.kv_head, self.positions) {
            Head::F32([keys, values]) => self.attend_to(kernels, keys, values, scratch, out),
            Head::F16([keys, values]) => self.attend_to(kernels, keys, values, scratch, out),
        }
    }

    fn attend_to<T: Float>(
        self,
        kernels: Kernels,
        keys: &[T],
        values: &[T],
        scratch: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), ShapeError> {
        let width = self.values.len();
        let scores = &mut scratch[..self.positions.next_multiple_of(SPAN)];
        let (used, unused) = scores.split_at_mut(self.positions);
        unused.fill(0.0);
        kernels.gemv_dense(keys, self.values, used)?;
        let total = exp_scores(used, 1.0 / libm::sqrtf(width as f32));
        out.fill(0.0);
        for (values, weights) in values.chunks_exact(SPAN * width).zip(scores.chunks_exact(SPAN)) {
            kernels.gemv_dense_add(values, weights, 1.0, out)?;
        }
        out.iter_mut().for_each(|out| *out /= total);
        Ok(())
    }
}

/// Values of the scratch that a query needs in a cache with this many positions.
pub(crate) fn scratch_len(positions: usize) -> usize {
    positions.saturating_add(SPAN)
}
