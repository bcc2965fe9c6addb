//! Keys and values of the positions that a sequence has had.

use alloc::vec::Vec;

use nf4::{Float, f16};

use crate::config::Config;
use crate::error::{Error, buffer};

/// Positions whose values stand together, transposed: the columns of a product of attention.
pub(crate) const SPAN: usize = 64;

/// The type that keys and values are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheType {
    /// As they are computed.
    #[default]
    F32,
    /// Rounded to f16, half the memory.
    F16,
}

/// Keys and values of one sequence, with room for a number of positions that is stated when it is made.
#[derive(Debug, Clone)]
pub struct Cache {
    storage: Storage,
    shape: Shape,
    len: usize,
}

#[derive(Debug, Clone)]
enum Storage {
    F32(Vec<Layer<f32>>),
    F16(Vec<Layer<f16>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    layers: usize,
    heads: usize,
    head_dim: usize,
    positions: usize,
}

/// Keys and values of one layer of the model.
#[derive(Debug, Clone)]
pub(crate) struct Layer<T> {
    /// `[kv_heads, positions, head_dim]`.
    keys: Vec<T>,
    /// `[kv_heads, spans, head_dim, SPAN]`; zero where there is no position yet.
    values: Vec<T>,
}

impl Cache {
    /// An empty cache for `positions` tokens; rounded up to a multiple of 64.
    ///
    /// # Errors
    /// [`Error::Room`] if the model attends to fewer positions (`max_position_embeddings` or `sliding_window`);
    /// [`Error::Memory`].
    pub fn new(config: &Config, positions: usize, kind: CacheType) -> Result<Self, Error> {
        if positions > config.positions {
            let what = "positions of the model (max_position_embeddings or sliding_window)";
            return Err(Error::Room { what, needed: positions, got: config.positions });
        }
        let (layers, heads, head_dim) = (config.layers, config.kv_heads, config.head_dim);
        let shape = Shape { layers, heads, head_dim, positions: positions.next_multiple_of(SPAN) };
        let storage = match kind {
            CacheType::F32 => Storage::F32(shape.layers()?),
            CacheType::F16 => Storage::F16(shape.layers()?),
        };
        Ok(Self { storage, shape, len: 0 })
    }

    /// Positions in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that there is room for.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.shape.positions
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let Shape { layers, heads, head_dim, positions } = self.shape;
        let size = if matches!(self.storage, Storage::F16(_)) { size_of::<f16>() } else { size_of::<f32>() };
        2 * layers * heads * head_dim * positions * size
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.len = len;
            match &mut self.storage {
                Storage::F32(layers) => layers.iter_mut().for_each(|layer| layer.clear_span_from(self.shape, len)),
                Storage::F16(layers) => layers.iter_mut().for_each(|layer| layer.clear_span_from(self.shape, len)),
            }
        }
    }

    /// `Ok` if `tokens` more fit, and the cache is for this model.
    pub(crate) fn check(&self, config: &Config, tokens: usize) -> Result<(), Error> {
        let Shape { layers, heads, head_dim, positions } = self.shape;
        if (layers, heads, head_dim) != (config.layers, config.kv_heads, config.head_dim) {
            return Err(Error::ForeignCache);
        }
        let needed = self.len.saturating_add(tokens);
        let what = "positions of the cache";
        if needed > positions { Err(Error::Room { what, needed, got: positions }) } else { Ok(()) }
    }

    /// Stores keys and values, each `[tokens, heads * head_dim]`, after the positions in use.
    pub(crate) fn store(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        match &mut self.storage {
            Storage::F32(layers) => layers[layer].store(self.shape, self.len, keys, values),
            Storage::F16(layers) => layers[layer].store(self.shape, self.len, keys, values),
        }
    }

    /// What was stored in every layer is in use now.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Keys `[len, head_dim]` and spans of values, each `[head_dim, SPAN]`, of a head.
    pub(crate) fn head(&self, layer: usize, head: usize, len: usize) -> Head<'_> {
        match &self.storage {
            Storage::F32(layers) => Head::F32(layers[layer].head(self.shape, head, len)),
            Storage::F16(layers) => Head::F16(layers[layer].head(self.shape, head, len)),
        }
    }
}

/// Keys and values of a head, in the type of the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Head<'a> {
    F32([&'a [f32]; 2]),
    F16([&'a [f16]; 2]),
}

impl Shape {
    fn layers<T: Clone + Default>(self) -> Result<Vec<Layer<T>>, Error> {
        let len = self.heads.saturating_mul(self.head_dim).saturating_mul(self.positions);
        let layer = |_| Ok(Layer { keys: buffer("keys", len)?, values: buffer("values", len)? });
        (0..self.layers).map(layer).collect()
    }
}

impl<T: Float + Default> Layer<T> {
    fn store(&mut self, shape: Shape, start: usize, keys: &[f32], values: &[f32]) {
        let Shape { heads, head_dim, positions, .. } = shape;
        let width = heads * head_dim;
        for (n, (keys, values)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let position = start + n;
            self.clear_span_from(shape, position);
            for (head, (keys, values)) in keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)).enumerate() {
                let to = &mut self.keys[(head * positions + position) * head_dim..][..head_dim];
                to.iter_mut().zip(keys).for_each(|(to, key)| *to = T::from_f32(*key));
                let span = (head * positions + position / SPAN * SPAN) * head_dim;
                let to = self.values[span..][..SPAN * head_dim].iter_mut().skip(position % SPAN).step_by(SPAN);
                to.zip(values).for_each(|(to, value)| *to = T::from_f32(*value));
            }
        }
    }

    /// Zeros for the positions from `position` to the end of its span: what stands there may be infinite, and is
    /// multiplied by 0. Later spans are cleared when they are begun.
    fn clear_span_from(&mut self, shape: Shape, position: usize) {
        let Shape { heads, head_dim, positions, .. } = shape;
        if position >= positions {
            return;
        }
        for head in 0..heads {
            let span = (head * positions + position / SPAN * SPAN) * head_dim;
            let rows = self.values[span..][..SPAN * head_dim].chunks_exact_mut(SPAN);
            rows.for_each(|row| row[position % SPAN..].fill(T::default()));
        }
    }

    fn head(&self, shape: Shape, head: usize, len: usize) -> [&[T]; 2] {
        let Shape { head_dim, positions, .. } = shape;
        let start = head * positions * head_dim;
        [&self.keys[start..][..len * head_dim], &self.values[start..][..len.next_multiple_of(SPAN) * head_dim]]
    }
}
