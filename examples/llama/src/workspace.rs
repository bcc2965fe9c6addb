//! The buffers of a forward pass.

use alloc::vec::Vec;

use crate::attention::scratch_len;
use crate::config::Config;
use crate::error::{Error, buffer};
use crate::linear::LinearScratch;
use crate::model::Model;

/// Buffers for a number of tokens at a time, made once; a forward pass leaves nothing in them that the next one reads.
#[derive(Debug)]
pub struct Workspace {
    tokens: usize,
    outputs: usize,
    floats: Vec<Vec<f32>>,
    adapters: Vec<Option<usize>>,
    scratch: LinearScratch,
}

/// The parts of a [`Workspace`] for the tokens of one pass, each `[tokens, width]`.
#[derive(Debug)]
pub(crate) struct Rows<'w> {
    /// The residual stream.
    pub(crate) stream: &'w mut [f32],
    pub(crate) normed: &'w mut [f32],
    /// What a branch adds to the stream.
    pub(crate) branch: &'w mut [f32],
    pub(crate) queries: &'w mut [f32],
    pub(crate) keys: &'w mut [f32],
    pub(crate) values: &'w mut [f32],
    pub(crate) attended: &'w mut [f32],
    pub(crate) gate: &'w mut [f32],
    pub(crate) up: &'w mut [f32],
    pub(crate) cos: &'w mut [f32],
    pub(crate) sin: &'w mut [f32],
    /// Scratch of attention, [`scratch_len`] of `positions` for each thread.
    pub(crate) scores: &'w mut [f32],
    pub(crate) positions: usize,
    /// `[outputs, vocabulary]`.
    pub(crate) logits: &'w mut [f32],
    /// The adapter of each row.
    pub(crate) adapters: &'w mut [Option<usize>],
    pub(crate) scratch: &'w mut LinearScratch,
}

impl Workspace {
    /// Buffers for up to `tokens` tokens in a pass, of which `outputs` get logits. Adapters that are added to the model
    /// later need a new one.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(model: &Model, tokens: usize, outputs: usize) -> Result<Self, Error> {
        let config = model.config();
        let mut floats = Vec::new();
        for width in widths(config) {
            floats.push(buffer("activations", width.saturating_mul(tokens))?);
        }
        let scores = scratch_len(config.positions).saturating_mul(model.pool().count());
        floats.push(buffer("scores", scores)?);
        floats.push(buffer("logits", config.vocabulary.saturating_mul(outputs))?);
        let mut scratch = LinearScratch::default();
        model.linears().try_for_each(|linear| scratch.reserve(linear, tokens))?;
        match model.head() {
            Some(head) => scratch.reserve(head, outputs)?,
            None => scratch.reserve_tile(model.pool().count())?,
        }
        Ok(Self { tokens, outputs, floats, adapters: buffer("adapters", tokens)?, scratch })
    }

    /// Tokens that fit into a pass.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.floats.iter().map(|f| f.len() * size_of::<f32>()).sum::<usize>() + self.scratch.memory_bytes()
    }

    pub(crate) fn rows(&mut self, model: &Model, tokens: usize, outputs: usize) -> Result<Rows<'_>, Error> {
        let checks = [("tokens of a pass", tokens, self.tokens), ("tokens with logits", outputs, self.outputs)];
        if let Some(&(what, needed, got)) = checks.iter().find(|(_, needed, got)| needed > got) {
            return Err(Error::Room { what, needed, got });
        }
        let config = model.config();
        let widths = widths(config);
        let fits = self.floats.iter().zip(widths).all(|(f, width)| f.len() >= width * tokens);
        let [stream, normed, branch, queries, keys, values, attended, gate, up, cos, sin, scores, logits] =
            &mut self.floats[..]
        else {
            return Err(Error::ForeignCache);
        };
        if !fits || logits.len() < outputs * config.vocabulary {
            return Err(Error::ForeignCache);
        }
        let [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10] = widths.map(|width| width * tokens);
        Ok(Rows {
            stream: &mut stream[..w0],
            normed: &mut normed[..w1],
            branch: &mut branch[..w2],
            queries: &mut queries[..w3],
            keys: &mut keys[..w4],
            values: &mut values[..w5],
            attended: &mut attended[..w6],
            gate: &mut gate[..w7],
            up: &mut up[..w8],
            cos: &mut cos[..w9],
            sin: &mut sin[..w10],
            scores,
            positions: config.positions,
            logits: &mut logits[..outputs * config.vocabulary],
            adapters: &mut self.adapters[..tokens],
            scratch: &mut self.scratch,
        })
    }
}

/// Widths of the buffers that have a row for each token, in the order of [`Rows`].
fn widths(config: &Config) -> [usize; 11] {
    let (q, kv, pairs) = (config.q_width(), config.kv_width(), config.head_dim / 2);
    let Config { hidden, intermediate, .. } = *config;
    [hidden, hidden, hidden, q, kv, kv, q, intermediate, intermediate, pairs, pairs]
}
