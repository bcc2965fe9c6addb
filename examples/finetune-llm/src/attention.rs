//! Causal attention of documents side by side, forward and backward.
//!
//! Queries are taken some at a time, with the keys that the last of them sees, so that about half of the products is left
//! out. Heads are shared between threads.

use std::ops::Range;

use nf4::{Kernels, ShapeError};
use nf4_llama::exp;
use rayon::prelude::*;

use crate::ops::{space, sum};

/// Queries of a tile.
const QUERIES: usize = 32;

/// Heads, and where documents start and end.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) documents: Vec<Range<usize>>,
    pub(crate) kernels: Kernels,
}

/// Buffers of the backward, for each head.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Attention {
    fn tokens(&self) -> usize {
        self.documents.last().map_or(0, |document| document.end)
    }

    /// Values of a head.
    fn head(&self) -> usize {
        self.tokens() * self.head_dim
    }

    /// The queries of the tiles, the keys that these see, and where the weights of a tile `[queries, keys]` stand among
    /// those of the head.
    fn tiles(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>, Range<usize>)> {
        let tiles = self.documents.iter().flat_map(|document| {
            document.clone().step_by(QUERIES).map(|start| {
                let end = document.end.min(start + QUERIES);
                (start..end, document.start..end)
            })
        });
        tiles.scan(0, |used, (queries, keys)| {
            let start = *used;
            *used += queries.len() * keys.len();
            Some((queries, keys, start..*used))
        })
    }

    /// Weights of a head.
    fn weights(&self) -> usize {
        self.tiles().last().map_or(0, |(_, _, weights)| weights.end)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Mixes values: `q` and `mixed` `[heads, tokens, head_dim]`, `k` and `v` `[kv_heads, tokens, head_dim]`. What the
    /// backward needs is left in `weights`.
    pub(crate) fn forward(
        &self,
        [q, k, v]: [&[f32]; 3],
        weights: &mut Vec<f32>,
        mixed: &mut [f32],
    ) -> Result<(), ShapeError> {
        let (head, group) = (self.head(), self.heads / self.kv_heads);
        let all = self.weights();
        let weights = space(weights, self.heads * all);
        let heads = q.par_chunks(head).zip(weights.par_chunks_mut(all)).zip(mixed.par_chunks_mut(head));
        heads.with_max_len(1).enumerate().try_for_each(|(h, ((q, weights), mixed))| {
            let of_kv = h / group * head..(h / group + 1) * head;
            self.head_forward([q, &k[of_kv.clone()], &v[of_kv]], weights, mixed)
        })
    }

    fn head_forward(&self, [q, k, v]: [&[f32]; 3], weights: &mut [f32], mixed: &mut [f32]) -> Result<(), ShapeError> {
        let of = |tokens: &Range<usize>| tokens.start * self.head_dim..tokens.end * self.head_dim;
        mixed.fill(0.0);
        for (queries, keys, place) in self.tiles() {
            let weights = &mut weights[place];
            self.kernels.gemm_dense(&q[of(&queries)], &k[of(&keys)], keys.len(), weights)?;
            for (i, row) in weights.chunks_exact_mut(keys.len()).enumerate() {
                let (seen, later) = row.split_at_mut(queries.start + i + 1 - keys.start);
                softmax(seen, self.scale());
                later.fill(0.0);
            }
            self.kernels.gemm_transposed_dense_add(&v[of(&keys)], weights, queries.len(), &mut mixed[of(&queries)])?;
        }
        Ok(())
    }

    /// The gradients of `q`, `k` and `v`, from what was left in `weights`, which is used up.
    pub(crate) fn backward(
        &self,
        [q, k, v]: [&[f32]; 3],
        weights: &mut [f32],
        mixed: &[f32],
        scratch: &mut Scratch,
        [dq, dk, dv]: [&mut [f32]; 3],
    ) -> Result<(), ShapeError> {
        let (head, group, all) = (self.head(), self.heads / self.kv_heads, self.weights());
        let keys = space(&mut scratch.keys, self.heads * head);
        let values = space(&mut scratch.values, self.heads * head);
        let outputs = dq.par_chunks_mut(head).zip(keys.par_chunks_mut(head)).zip(values.par_chunks_mut(head));
        let heads = q.par_chunks(head).zip(weights.par_chunks_mut(all)).zip(mixed.par_chunks(head)).zip(outputs);
        heads.with_max_len(1).enumerate().try_for_each(|(h, (((q, weights), mixed), ((dq, dk), dv)))| {
            let of_kv = h / group * head..(h / group + 1) * head;
            self.head_backward([q, &k[of_kv.clone()], &v[of_kv]], weights, mixed, [dq, dk, dv])
        })?;
        // Keys and values of the heads that share them, in order.
        for (all, out) in [(keys, dk), (values, dv)] {
            for (all, out) in all.chunks_exact(group * head).zip(out.chunks_exact_mut(head)) {
                out.copy_from_slice(&all[..head]);
                for one in all[head..].chunks_exact(head) {
                    out.iter_mut().zip(one).for_each(|(out, one)| *out += one);
                }
            }
        }
        Ok(())
    }

    /// With the weights `p` of a query and `dp = dmixed v`: `dscores = scale * p (dp - sum(p dp))`.
    fn head_backward(
        &self,
        [q, k, v]: [&[f32]; 3],
        weights: &mut [f32],
        mixed: &[f32],
        [dq, dk, dv]: [&mut [f32]; 3],
    ) -> Result<(), ShapeError> {
        let of = |tokens: &Range<usize>| tokens.start * self.head_dim..tokens.end * self.head_dim;
        let longest = self.documents.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let (mut scores, mut turned) = (vec![0.0; QUERIES * longest], vec![0.0; QUERIES * longest]);
        [&mut *dq, &mut *dk, &mut *dv].into_iter().for_each(|out| out.fill(0.0));
        for (queries, keys, place) in self.tiles() {
            let (weights, scores) = (&mut weights[place.clone()], &mut scores[..place.len()]);
            let (mixed, turned) = (&mixed[of(&queries)], &mut turned[..place.len()]);
            self.kernels.gemm_dense(mixed, &v[of(&keys)], keys.len(), scores)?;
            for (scores, weights) in scores.chunks_exact_mut(keys.len()).zip(weights.chunks_exact(keys.len())) {
                let sum = sum(scores, weights, |a, b| a * b);
                let scale = self.scale();
                scores.iter_mut().zip(weights).for_each(|(score, weight)| *score = scale * weight * (*score - sum));
            }
            self.kernels.gemm_transposed_dense_add(&k[of(&keys)], scores, queries.len(), &mut dq[of(&queries)])?;
            transpose(scores, keys.len(), turned);
            self.kernels.gemm_transposed_dense_add(&q[of(&queries)], turned, keys.len(), &mut dk[of(&keys)])?;
            transpose(weights, keys.len(), turned);
            self.kernels.gemm_transposed_dense_add(mixed, turned, keys.len(), &mut dv[of(&keys)])?;
        }
        Ok(())
    }
}

/// The softmax of `scale * scores`, in their place.
fn softmax(scores: &mut [f32], scale: f32) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| max.max(*score));
    scores.iter_mut().for_each(|score| *score = exp((*score - max) * scale));
    let factor = 1.0 / sum(scores, scores, |score, _| score);
    scores.iter_mut().for_each(|score| *score *= factor);
}

/// A matrix of rows of `cols` values, transposed.
fn transpose(matrix: &[f32], cols: usize, out: &mut [f32]) {
    let rows = matrix.len() / cols;
    for (r, row) in matrix.chunks_exact(cols).enumerate() {
        for (value, out) in row.iter().zip(out.chunks_exact_mut(rows)) {
            out[r] = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "tests end at the first surprise")]

    use super::*;
    use crate::ops::tests::{check, values};

    fn attention(heads: usize, documents: Vec<Range<usize>>) -> Attention {
        Attention { heads, kv_heads: 2, head_dim: 4, documents, kernels: Kernels::detect() }
    }

    fn forward(attention: &Attention, inputs: &[Vec<f32>]) -> Vec<f32> {
        let mut mixed = vec![f32::NAN; inputs[0].len()];
        attention.forward([&inputs[0], &inputs[1], &inputs[2]], &mut Vec::new(), &mut mixed).unwrap();
        mixed
    }

    fn inputs(attention: &Attention) -> Vec<Vec<f32>> {
        let [all, shared] = [attention.heads, attention.kv_heads].map(|heads| heads * attention.head());
        vec![values(all, 0.0), values(shared, 1.0), values(shared, 2.0)]
    }

    /// Two documents, one of more than a tile, against the definition in f64.
    #[test]
    fn values_are_those_of_the_definition() {
        let attention = attention(6, vec![0..5, 5..45]);
        let inputs = inputs(&attention);
        let mixed = forward(&attention, &inputs);
        let at = |values: &[f32], head: usize, token: usize| -> Vec<f64> {
            let start = head * attention.head() + token * 4;
            values[start..start + 4].iter().map(|x| f64::from(*x)).collect()
        };
        for (h, t) in (0..6).flat_map(|h| (0..45).map(move |t| (h, t))) {
            let seen = if t < 5 { 0..t + 1 } else { 5..t + 1 };
            let q = at(&inputs[0], h, t);
            let weight = |s: usize| {
                let dot: f64 = q.iter().zip(at(&inputs[1], h / 3, s)).map(|(q, k)| q * k).sum();
                (dot / 2.0).exp()
            };
            let all: f64 = seen.clone().map(weight).sum();
            for (i, got) in at(&mixed, h, t).into_iter().enumerate() {
                let exact: f64 = seen.clone().map(|s| weight(s) / all * at(&inputs[2], h / 3, s)[i]).sum();
                assert!((got - exact).abs() < 1e-6, "{h}, {t}: {got}, {exact}");
            }
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let attention = attention(4, vec![0..2, 2..36]);
        let inputs = inputs(&attention);
        let (dy, mut weights, mut mixed) = (values(inputs[0].len(), 3.0), Vec::new(), vec![0.0; inputs[0].len()]);
        let [q, k, v] = [&inputs[0][..], &inputs[1], &inputs[2]];
        attention.forward([q, k, v], &mut weights, &mut mixed).unwrap();
        let mut gradients = inputs.clone();
        let [dq, dk, dv] = &mut gradients[..] else { unreachable!() };
        attention.backward([q, k, v], &mut weights, &dy, &mut Scratch::default(), [dq, dk, dv]).unwrap();
        check(&inputs, &gradients, &dy, |inputs| forward(&attention, inputs));
    }
}
