//! One layer of the decoder.

use alloc::vec::Vec;

use super::{Model, Part};
use crate::attention::{Query, scratch_len};
use crate::config::Config;
use crate::linear::{Linear, forward_all};
use crate::math::{rms_norm, rms_norm_in_place, silu_times};
use crate::rope::rotate;
use crate::workspace::Rows;

/// One decoder layer.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) input_norm: Vec<f32>,
    pub(super) query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    pub(super) output: Linear,
    /// Norms of each head's query and key.
    pub(super) head_norms: Option<[Vec<f32>; 2]>,
    pub(super) post_norm: Vec<f32>,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

impl Block {
    /// With their names in the layer.
    pub(super) fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.query),
            ("self_attn.k_proj", &mut self.key),
            ("self_attn.v_proj", &mut self.value),
            ("self_attn.o_proj", &mut self.output),
            ("mlp.gate_proj", &mut self.gate),
            ("mlp.up_proj", &mut self.up),
            ("mlp.down_proj", &mut self.down),
        ]
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down].into_iter()
    }

    /// Adds what the layer, number `layer`, makes of the stream to it.
    pub(super) fn forward(
        &self,
        model: &Model,
        layer: usize,
        parts: &mut [Part<'_>],
        w: &mut Rows<'_>,
    ) -> Result<(), nf4::Error> {
        let Config { head_dim, norm_eps, .. } = model.config;
        norm_rows(w.stream, &self.input_norm, norm_eps, w.normed);
        let qkv = [(&self.query, &mut *w.queries), (&self.key, &mut *w.keys), (&self.value, &mut *w.values)];
        forward_all(qkv, w.normed, w.adapters, w.scratch)?;
        if let Some([query, key]) = &self.head_norms {
            w.queries.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, query, norm_eps));
            w.keys.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, key, norm_eps));
        }
        let pairs = head_dim / 2;
        let angles = w.cos.chunks_exact(pairs).zip(w.sin.chunks_exact(pairs));
        let queries = w.queries.chunks_exact_mut(model.config.q_width());
        let rows = queries.zip(w.keys.chunks_exact_mut(model.config.kv_width()));
        for ((queries, keys), (cos, sin)) in rows.zip(angles) {
            rotate(queries, head_dim, cos, sin);
            rotate(keys, head_dim, cos, sin);
        }
        attend(model, layer, parts, w)?;
        self.output.forward(w.attended, w.adapters, w.scratch, w.branch)?;
        add(w.stream, w.branch);
        norm_rows(w.stream, &self.post_norm, norm_eps, w.normed);
        let gate_up = [(&self.gate, &mut *w.gate), (&self.up, &mut *w.up)];
        forward_all(gate_up, w.normed, w.adapters, w.scratch)?;
        silu_times(w.gate, w.up);
        self.down.forward(w.gate, w.adapters, w.scratch, w.branch)?;
        add(w.stream, w.branch);
        Ok(())
    }
}

/// Stores the new keys and values, and lets each head of each token attend to its sequence.
fn attend(model: &Model, layer: usize, parts: &mut [Part<'_>], w: &mut Rows<'_>) -> Result<(), nf4::Error> {
    let Config { head_dim, heads, kv_heads, .. } = model.config;
    let (q_width, kv_width) = (model.config.q_width(), model.config.kv_width());
    let each = scratch_len(w.positions);
    let mut row = 0;
    for part in parts {
        let tokens = part.tokens.len();
        let kv = row * kv_width..(row + tokens) * kv_width;
        part.cache.store(layer, &w.keys[kv.clone()], &w.values[kv]);
        let q = row * q_width..(row + tokens) * q_width;
        let (cache, queries) = (&*part.cache, &w.queries[q.clone()]);
        // A row of the work is a head of a token.
        model.pool.by_rows((&mut w.attended[q], head_dim), (w.scores, each), &|first, out, scratch| {
            let heads_of = queries[first * head_dim..].chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
            heads_of.enumerate().try_for_each(|(n, (values, out))| {
                let (token, head) = ((first + n) / heads, (first + n) % heads);
                let kv_head = head / (heads / kv_heads);
                let query = Query { cache, layer, kv_head, positions: cache.len() + token + 1, values };
                query.attend(model.kernels, scratch, out)
            })
        })?;
        row += tokens;
    }
    Ok(())
}

fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let rows = x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len()));
    rows.for_each(|(x, out)| rms_norm(x, weight, eps, out));
}

fn add(stream: &mut [f32], branch: &[f32]) {
    stream.iter_mut().zip(branch).for_each(|(s, b)| *s += b);
}
