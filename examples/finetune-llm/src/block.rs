//! A block of the decoder: attention and perceptron, each of what a norm made of its input, and added to it.
//!
//! Everything is on slices in buffers that stay from step to step.

use std::sync::Arc;

use candle_core::{Error, Result};
use nf4_llama::Config;

use crate::attention::{self, Attention};
use crate::linear::{self, Linear, Ready, forward};
use crate::ops::{Angles, add, rms_norm, rms_norm_backward, rows, silu_times, silu_times_backward, space};

#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) input_norm: Arc<[f32]>,
    /// In the order of [`LINEARS`](crate::model::LINEARS).
    pub(crate) linears: Vec<Linear>,
    /// Of queries and keys.
    pub(crate) head_norms: Option<[Arc<[f32]>; 2]>,
    pub(crate) post_norm: Arc<[f32]>,
}

/// Where the tokens of a sequence stand.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) angles: Angles,
    pub(crate) attention: Attention,
}

/// What a forward leaves for the backward: `[tokens, ...]`, but for the heads.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    layers: Vec<Ready>,
    x: Vec<f32>,
    normed: Vec<f32>,
    /// Queries and keys before their norms, if they have norms.
    raw: [Vec<f32>; 2],
    /// Queries, keys and values, `[heads, tokens, head_dim]`.
    heads: [Vec<f32>; 3],
    weights: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    normed_middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
}

/// Buffers that nothing stays in.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    linear: linear::Scratch,
    attention: attention::Scratch,
    /// Of the width of the model.
    wide: Vec<f32>,
    more: Vec<f32>,
    inner: Vec<f32>,
    mixed: Vec<f32>,
    /// Queries, keys and values.
    heads: [Vec<f32>; 3],
}

/// The forward.
impl Block {
    /// The outputs of the block in the place of its inputs `x`, `[tokens, hidden]`.
    pub(crate) fn forward(
        &self,
        x: &mut [f32],
        config: &Config,
        place: &Place,
        kept: &mut Kept,
        scratch: &mut Scratch,
    ) -> Result<()> {
        kept.layers.clear();
        for linear in &self.linears {
            kept.layers.push(linear.ready()?);
        }
        self.attend(x, config, place, kept, scratch)?;
        self.perceive(x, config, kept, scratch)
    }

    fn attend(
        &self,
        x: &mut [f32],
        config: &Config,
        place: &Place,
        kept: &mut Kept,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let [query, key, value, output, ..] = kept.layers.as_slice() else { return Err(incomplete()) };
        let tokens = x.len() / config.hidden;
        space(&mut kept.x, x.len()).copy_from_slice(x);
        rms_norm(x, &self.input_norm, config.norm_eps, space(&mut kept.normed, x.len()));
        let [q, k, v] = &mut scratch.heads;
        let kv = tokens * config.kv_width();
        let outputs = [space(q, tokens * config.q_width()), space(k, kv), space(v, kv)];
        forward([query, key, value], &kept.normed, &mut scratch.linear, outputs)?;
        for ((raw, x), norm) in kept.raw.iter_mut().zip([&mut *q, k]).zip(self.head_norms.iter().flatten()) {
            std::mem::swap(raw, x);
            rms_norm(raw, norm, config.norm_eps, space(x, raw.len()));
        }
        let rotates = [Some(&place.angles), Some(&place.angles), None];
        for ((x, heads), rotates) in scratch.heads.iter().zip(&mut kept.heads).zip(rotates) {
            to_heads(x, [tokens, config.head_dim], rotates, space(heads, x.len()));
        }
        let heads = kept.heads.each_ref().map(Vec::as_slice);
        let mixed = space(&mut scratch.mixed, heads[0].len());
        place.attention.forward(heads, &mut kept.weights, mixed).map_err(Error::wrap)?;
        from_heads(mixed, [tokens, config.head_dim], None, space(&mut kept.attended, mixed.len()));
        let wide = space(&mut scratch.wide, x.len());
        forward([output], &kept.attended, &mut scratch.linear, [&mut *wide])?;
        add(wide, x);
        Ok(())
    }

    fn perceive(&self, x: &mut [f32], config: &Config, kept: &mut Kept, scratch: &mut Scratch) -> Result<()> {
        let [.., gate, up, down] = kept.layers.as_slice() else { return Err(incomplete()) };
        space(&mut kept.middle, x.len()).copy_from_slice(x);
        rms_norm(x, &self.post_norm, config.norm_eps, space(&mut kept.normed_middle, x.len()));
        let inner = x.len() / config.hidden * config.intermediate;
        let outputs = [space(&mut kept.gate, inner), space(&mut kept.up, inner)];
        forward([gate, up], &kept.normed_middle, &mut scratch.linear, outputs)?;
        silu_times(&kept.gate, &kept.up, space(&mut kept.inner, inner));
        let wide = space(&mut scratch.wide, x.len());
        forward([down], &kept.inner, &mut scratch.linear, [&mut *wide])?;
        add(wide, x);
        Ok(())
    }
}

/// The backward.
impl Block {
    /// The gradient of the block's inputs in the place of that of its outputs, `dx`. Returned are the gradients of the
    /// variables, those of each layer that has an adapter. What was kept is used up. Nothing is learned before the `first`
    /// block, whose `dx` is not that of its inputs.
    pub(crate) fn backward(
        &self,
        dx: &mut [f32],
        first: bool,
        config: &Config,
        place: &Place,
        kept: &mut Kept,
        scratch: &mut Scratch,
    ) -> Result<Vec<Vec<f32>>> {
        self.perceive_backward(dx, config, kept, scratch)?;
        self.attend_backward(dx, first, config, place, kept, scratch)?;
        Ok(kept.layers.drain(..).flat_map(Ready::into_gradients).collect())
    }

    fn perceive_backward(&self, dx: &mut [f32], config: &Config, kept: &mut Kept, scratch: &mut Scratch) -> Result<()> {
        let Kept { layers, middle, normed_middle, gate, up, inner, .. } = kept;
        let [.., gate_layer, up_layer, down] = layers.as_mut_slice() else { return Err(incomplete()) };
        let of_inner = space(&mut scratch.inner, inner.len());
        down.backward(inner, dx, &mut scratch.linear, Some(of_inner))?;
        silu_times_backward(gate, up, of_inner);
        let (of_normed, more) = (space(&mut scratch.wide, dx.len()), space(&mut scratch.more, dx.len()));
        gate_layer.backward(normed_middle, gate, &mut scratch.linear, Some(of_normed))?;
        up_layer.backward(normed_middle, up, &mut scratch.linear, Some(more))?;
        add(more, of_normed);
        rms_norm_backward(middle, &self.post_norm, config.norm_eps, of_normed, dx);
        Ok(())
    }

    fn attend_backward(
        &self,
        dx: &mut [f32],
        first: bool,
        config: &Config,
        place: &Place,
        kept: &mut Kept,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Kept { layers, x, normed, raw, heads, weights, attended, .. } = kept;
        let [query, key, value, output, ..] = layers.as_mut_slice() else { return Err(incomplete()) };
        let shape = [dx.len() / config.hidden, config.head_dim];
        let wide = space(&mut scratch.wide, attended.len());
        output.backward(attended, dx, &mut scratch.linear, Some(wide))?;
        let mixed = space(&mut scratch.mixed, attended.len());
        to_heads(wide, shape, None, mixed);
        let [dq, dk, dv] = &mut scratch.heads;
        let gradients = [space(dq, heads[0].len()), space(dk, heads[1].len()), space(dv, heads[2].len())];
        let values = heads.each_ref().map(Vec::as_slice);
        place.attention.backward(values, weights, mixed, &mut scratch.attention, gradients).map_err(Error::wrap)?;
        // The heads are not needed any more: their gradients take their place.
        let rotates = [Some(&place.angles), Some(&place.angles), None];
        for ((gradient, heads), rotates) in scratch.heads.iter().zip(&mut *heads).zip(rotates) {
            from_heads(gradient, shape, rotates, heads);
        }
        for ((raw, (dx, dy)), norm) in
            raw.iter().zip(scratch.heads.iter_mut().zip(&mut *heads)).zip(self.head_norms.iter().flatten())
        {
            dx.fill(0.0);
            rms_norm_backward(raw, norm, config.norm_eps, dy, dx);
            std::mem::swap(dx, dy);
        }
        let layers = [query, key, value].into_iter().zip(&*heads);
        if first {
            return layers
                .into_iter()
                .try_for_each(|(layer, dy)| layer.backward(normed, dy, &mut scratch.linear, None));
        }
        let (of_normed, more) = (space(&mut scratch.wide, dx.len()), space(&mut scratch.more, dx.len()));
        of_normed.fill(0.0);
        for (layer, dy) in layers {
            layer.backward(normed, dy, &mut scratch.linear, Some(more))?;
            add(more, of_normed);
        }
        rms_norm_backward(x, &self.input_norm, config.norm_eps, of_normed, dx);
        Ok(())
    }
}

fn incomplete() -> Error {
    Error::Msg("a block has seven linear layers, which a forward makes ready".to_string())
}

/// `[tokens, heads * head_dim]` as `[heads, tokens, head_dim]`, rotated if there are angles.
fn to_heads(x: &[f32], [tokens, head_dim]: [usize; 2], rotates: Option<&Angles>, y: &mut [f32]) {
    let heads = x.len() / (tokens * head_dim).max(1);
    rows(y, head_dim, |row, y| {
        let (head, token) = (row / tokens, row % tokens);
        let x = &x[(token * heads + head) * head_dim..][..head_dim];
        match rotates {
            Some(angles) => angles.rotate(token, 1.0, x, y),
            None => y.copy_from_slice(x),
        }
    });
}

/// `[heads, tokens, head_dim]` as `[tokens, heads * head_dim]`, rotated back if there are angles.
fn from_heads(x: &[f32], [tokens, head_dim]: [usize; 2], rotates: Option<&Angles>, y: &mut [f32]) {
    let heads = x.len() / (tokens * head_dim).max(1);
    rows(y, head_dim, |row, y| {
        let (token, head) = (row / heads, row % heads);
        let x = &x[(head * tokens + token) * head_dim..][..head_dim];
        match rotates {
            Some(angles) => angles.rotate(token, -1.0, x, y),
            None => y.copy_from_slice(x),
        }
    });
}
