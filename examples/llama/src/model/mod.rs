//! The decoder.

mod adapters;
mod block;
mod forward;
mod load;

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use nf4::{Arithmetic, Kernels};

use self::block::Block;
use crate::cache::Cache;
use crate::config::Config;
use crate::error::Error;
use crate::linear::Linear;
use crate::matrix::Matrix;
use crate::threads::Pool;

/// How a model is loaded.
#[derive(Clone, Default)]
pub struct Options {
    /// How packed weights are multiplied.
    pub arithmetic: Arithmetic,
    /// The kernels.
    pub kernels: Kernels,
    /// Whether the head is quantized to NF4, if it is not already.
    pub quantize_head: bool,
    /// The threads. Without any, attention and dense products run on the calling thread, products with packed weights on
    /// the threads of `nf4`: with the feature `std`, the current `rayon` pool.
    pub threads: Option<Arc<dyn nf4::Threads>>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { arithmetic, kernels, quantize_head, threads } = self;
        let threads = threads.as_ref().map(|threads| threads.count());
        write!(f, "Options {{ {arithmetic:?}, {kernels:?}, quantize_head: {quantize_head}, threads: {threads:?} }}")
    }
}

/// A decoder, and its adapters.
#[derive(Debug)]
pub struct Model {
    config: Config,
    kernels: Kernels,
    pool: Pool,
    embedding: Matrix,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// `None` if it is the embedding.
    head: Option<Linear>,
    adapters: Vec<String>,
}

/// An adapter of a model, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterId(usize);

/// Tokens that continue a sequence.
#[derive(Debug)]
pub struct Part<'a> {
    /// What the sequence had before.
    pub cache: &'a mut Cache,
    /// The tokens, in order.
    pub tokens: &'a [u32],
    /// The adapter of the sequence.
    pub adapter: Option<AdapterId>,
}

/// For which tokens logits are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: the caches are filled.
    None,
    /// The last token of each part.
    Last,
    /// Every token.
    All,
}

/// Accessors.
impl Model {
    /// Sizes and variants.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The kernels in use.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The adapter of this name.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is none.
    pub fn adapter(&self, name: &str) -> Result<AdapterId, Error> {
        let place = self.adapters.iter().position(|a| a == name);
        place.map(AdapterId).ok_or_else(|| Error::Adapter { name: name.to_string(), duplicate: false })
    }

    /// The names of all adapters, in the order in which they were added.
    pub fn adapter_names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(String::as_str)
    }

    /// Bytes of all weights, mapped or not.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.linears().chain(&self.head).map(Linear::data_bytes).sum::<usize>() + self.embedding.data_bytes()
    }

    /// The linear layers of the blocks.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// The head, if it is not the embedding.
    pub(crate) fn head(&self) -> Option<&Linear> {
        self.head.as_ref()
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }
}
