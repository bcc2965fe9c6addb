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

/// The output of one query head. `scores` has room for the positions, rounded up to whole spans, `span` for a span of
/// keys or values.
pub(crate) fn attend(
    kernels: Kernels,
    query: Query<'_>,
    scores: &mut [f32],
    span: &mut [f32],
    out: &mut [f32],
) -> Result<(), ShapeError> {
    let scores = &mut scores[..query.positions.next_multiple_of(SPAN)];
    match query.cache.head(query.layer, query.kv_head, query.positions) {
        Head::F32([keys, values]) => attend_in(kernels, query, keys, values, scores, span, out),
        Head::F16([keys, values]) => attend_in(kernels, query, keys, values, scores, span, out),
    }
}

fn attend_in<T: Float>(
    kernels: Kernels,
    query: Query<'_>,
    keys: &[T],
    values: &[T],
    scores: &mut [f32],
    span: &mut [f32],
    out: &mut [f32],
) -> Result<(), ShapeError> {
    let width = query.values.len();
    let span = &mut span[..SPAN * width];
    let (used, unused) = scores.split_at_mut(query.positions);
    unused.fill(0.0);
    for (keys, scores) in keys.chunks(span.len()).zip(used.chunks_mut(SPAN)) {
        let span = &mut span[..keys.len()];
        span.iter_mut().zip(keys).for_each(|(s, key)| *s = key.to_f32());
        kernels.gemv_dense(span, query.values, scores)?;
    }
    let total = exp_scores(used, 1.0 / libm::sqrtf(width as f32));
    out.fill(0.0);
    for (values, weights) in values.chunks_exact(span.len()).zip(scores.chunks_exact(SPAN)) {
        span.iter_mut().zip(values).for_each(|(s, value)| *s = value.to_f32());
        kernels.gemv_dense_add(span, weights, 1.0, out)?;
    }
    out.iter_mut().for_each(|out| *out /= total);
    Ok(())
}
