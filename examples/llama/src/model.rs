//! The decoder: loading and the forward pass.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use nf4::checkpoint::{PeftAdapter, PeftModule, TensorSource};
use nf4::{Arithmetic, Kernels};

use crate::attention::{Query, scratch_len};
use crate::cache::Cache;
use crate::config::Config;
use crate::error::Error;
use crate::linear::{Linear, Settings, forward_all};
use crate::math::{rms_norm, rms_norm_in_place, silu_times};
use crate::matrix::Matrix;
use crate::rope::rotate;
use crate::threads::Pool;
use crate::weights::{Unused, vector};
use crate::workspace::{Rows, Workspace};

/// How a model is loaded.
#[derive(Clone, Default)]
pub struct Options {
    /// How packed weights are multiplied.
    pub arithmetic: Arithmetic,
    /// The kernels.
    pub kernels: Kernels,
    /// Whether the head is quantized to NF4, if it is not already.
    pub quantize_head: bool,
    /// Threads for attention and dense products. Products with packed weights run on those of `nf4`: with the feature
    /// `std`, the current `rayon` pool.
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

/// One decoder layer.
#[derive(Debug)]
struct Block {
    input_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Norms of each head's query and key.
    head_norms: Option<[Vec<f32>; 2]>,
    post_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

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

/// Loading.
impl Model {
    /// Reads a model. `progress` is called before each linear layer with the number of those done and of all.
    ///
    /// Weights that are packed stay as they are. Others are quantized if the checkpoint is not a quantized one; if it
    /// is, it left them dense on purpose, and so they stay.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is missing, or has another shape than `config` needs; [`Error::Layer`]
    /// for one that is not finite; [`Error::Unsupported`] for a tensor that the model has no place for.
    pub fn load(
        config: Config,
        source: &dyn TensorSource,
        options: Options,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, Error> {
        let settings = Settings {
            pool: Pool(options.threads.clone()),
            arithmetic: options.arithmetic,
            kernels: options.kernels,
            quantize: config.quantization.is_none(),
        };
        let mut loader = Loader {
            source,
            settings: settings.clone(),
            unused: Unused::new(source),
            done: 0,
            all: 7 * config.layers + 1,
            progress: &mut progress,
        };
        let embedding = loader.matrix("model.embed_tokens", [config.vocabulary, config.hidden])?;
        let blocks = (0..config.layers).map(|i| Block::load(&mut loader, &config, i)).collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight", config.hidden)?;
        let head_settings = Settings { quantize: options.quantize_head, ..settings.clone() };
        let head_shape = [config.vocabulary, config.hidden];
        let head = match (config.tied, options.quantize_head) {
            (true, false) => None,
            (true, true) => {
                let packed = embedding.quantize().and_then(|weight| Linear::packed(weight, None, &settings));
                Some(packed.map_err(Error::layer("model.embed_tokens"))?)
            }
            (false, _) => Some(loader.linear_with("lm_head", head_shape, false, &head_settings)?),
        };
        loader.unused.check(config.tied)?;
        (loader.progress)(loader.all, loader.all);
        Ok(Self {
            config,
            kernels: options.kernels,
            pool: Pool(options.threads),
            embedding,
            blocks,
            norm,
            head,
            adapters: Vec::new(),
        })
    }

    /// Adds an adapter of PEFT. It is used by the sequences that ask for it.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is one of this name; [`Error::Unsupported`] if it is for a module that the model
    /// does not have, or replaces tensors of the model; [`Error::Layer`] if it does not fit.
    pub fn add_adapter(&mut self, name: &str, adapter: &PeftAdapter) -> Result<AdapterId, Error> {
        if self.adapters.iter().any(|a| a == name) {
            return Err(Error::Adapter { name: name.to_string(), duplicate: true });
        }
        let unsupported = |what: &str, reason: &str| {
            Err(Error::Unsupported { what: format!("adapter {name}: {what}"), reason: reason.to_string() })
        };
        if let Some(tensor) = adapter.replaced().keys().next() {
            return unsupported(tensor, "an adapter that replaces tensors of the model cannot be switched");
        }
        for (module, part) in adapter.modules() {
            let Some(linear) = self.linear_mut(module) else {
                return unsupported(module, "the model has no linear layer of this name");
            };
            linear.check(part.adapter()).map_err(Error::layer(module))?;
            if part.lora_bias().is_some() {
                return unsupported(module, "an adapter with a bias (lora_bias) cannot be switched");
            }
            if linear.is_dense() && part.adapter().magnitude().is_some() {
                return unsupported(module, "DoRA on a layer that is not quantized");
            }
        }
        for (index, block) in self.blocks.iter_mut().enumerate() {
            for (part, linear) in block.linears_mut() {
                let module = format!("model.layers.{index}.{part}");
                let part = adapter.module(&module).map(PeftModule::adapter);
                linear.add(name, part).map_err(Error::layer(&module))?;
            }
        }
        self.adapters.push(name.to_string());
        Ok(AdapterId(self.adapters.len() - 1))
    }

    /// The layer of this name.
    fn linear_mut(&mut self, module: &str) -> Option<&mut Linear> {
        let (index, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let block = self.blocks.get_mut(index.parse::<usize>().ok()?)?;
        block.linears_mut().into_iter().find(|(name, _)| *name == part).map(|(_, linear)| linear)
    }
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

    pub(crate) fn embedding(&self) -> &Matrix {
        &self.embedding
    }
}

/// The forward pass.
impl Model {
    /// Continues sequences with their next tokens, and returns logits, `[tokens, vocabulary]`, of the tokens that
    /// `logits` says, part by part.
    ///
    /// The bits of a token's logits depend on its sequence and adapter alone: neither on what else is in the batch, nor
    /// on how the sequence was cut into calls, nor on the machine.
    ///
    /// # Errors
    /// [`Error::Token`]; [`Error::Room`] if the tokens do not fit into the workspace or a cache; [`Error::ForeignCache`].
    /// The caches are as before then.
    pub fn forward<'w>(
        &self,
        parts: &mut [Part<'_>],
        logits: Logits,
        workspace: &'w mut Workspace,
    ) -> Result<&'w mut [f32], Error> {
        let Config { hidden, vocabulary, norm_eps, .. } = self.config;
        let rows: usize = parts.iter().map(|part| part.tokens.len()).sum();
        let wanted = match logits {
            Logits::None => 0,
            Logits::All => rows,
            Logits::Last => parts.iter().filter(|part| !part.tokens.is_empty()).count(),
        };
        for part in parts.iter() {
            part.cache.check(&self.config, part.tokens.len())?;
        }
        let mut w = workspace.rows(self, rows, wanted)?;
        let mut row = 0;
        for part in parts.iter() {
            for (n, &token) in part.tokens.iter().enumerate() {
                let place = usize::try_from(token).ok().filter(|t| *t < vocabulary);
                let place = place.ok_or(Error::Token { token, vocabulary })?;
                self.embedding.row(place, &mut w.stream[row * hidden..][..hidden]);
                let pairs = self.config.rope.pairs();
                let (cos, sin) = (&mut w.cos[row * pairs..][..pairs], &mut w.sin[row * pairs..][..pairs]);
                self.config.rope.angles(part.cache.len() + n, cos, sin);
                w.adapters[row] = part.adapter.map(|id| id.0);
                row += 1;
            }
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let fail = |error| Error::Layer { module: format!("model.layers.{layer}"), error };
            block.forward(self, layer, parts, &mut w).map_err(fail)?;
        }
        for part in parts.iter_mut() {
            part.cache.advance(part.tokens.len());
        }

        // Rows whose logits are wanted.
        let mut row = 0;
        let mut out = w.normed.chunks_exact_mut(hidden);
        for part in parts.iter() {
            let first = match logits {
                Logits::None => part.tokens.len(),
                Logits::Last => part.tokens.len().saturating_sub(1),
                Logits::All => 0,
            };
            for (n, out) in (first..part.tokens.len()).zip(&mut out) {
                rms_norm(&w.stream[(row + n) * hidden..][..hidden], &self.norm, norm_eps, out);
            }
            row += part.tokens.len();
        }
        let x = &w.normed[..wanted * hidden];
        let head = match &self.head {
            None => self.embedding.product(self.kernels, &self.pool, x, &mut w.scratch.tile, w.logits),
            Some(head) => {
                // No adapter has a part for the head.
                let adapters = &mut w.adapters[..wanted];
                adapters.fill(None);
                head.forward(x, adapters, w.scratch, w.logits)
            }
        };
        head.map_err(|error| Error::Layer { module: "lm_head".to_string(), error })?;
        Ok(w.logits)
    }
}

impl Block {
    fn load(loader: &mut Loader<'_, '_>, config: &Config, index: usize) -> Result<Self, Error> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let Config { hidden, intermediate, head_dim, qkv_bias, output_bias, mlp_bias, .. } = *config;
        let (q, kv) = (config.q_width(), config.kv_width());
        let mut head_norm = |part: &str| loader.vector(&name(part), head_dim);
        let head_norms = if config.qk_norm {
            Some([head_norm("self_attn.q_norm.weight")?, head_norm("self_attn.k_norm.weight")?])
        } else {
            None
        };
        Ok(Self {
            input_norm: loader.vector(&name("input_layernorm.weight"), hidden)?,
            query: loader.linear(&name("self_attn.q_proj"), [q, hidden], qkv_bias)?,
            key: loader.linear(&name("self_attn.k_proj"), [kv, hidden], qkv_bias)?,
            value: loader.linear(&name("self_attn.v_proj"), [kv, hidden], qkv_bias)?,
            output: loader.linear(&name("self_attn.o_proj"), [hidden, q], output_bias)?,
            head_norms,
            post_norm: loader.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate: loader.linear(&name("mlp.gate_proj"), [intermediate, hidden], mlp_bias)?,
            up: loader.linear(&name("mlp.up_proj"), [intermediate, hidden], mlp_bias)?,
            down: loader.linear(&name("mlp.down_proj"), [hidden, intermediate], mlp_bias)?,
        })
    }

    /// With their names in the layer.
    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
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

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down].into_iter()
    }

    fn forward(&self, model: &Model, layer: usize, parts: &mut [Part<'_>], w: &mut Rows<'_>) -> Result<(), nf4::Error> {
        let Config { head_dim, norm_eps, heads, kv_heads, .. } = model.config;
        let (q_width, kv_width) = (model.config.q_width(), model.config.kv_width());
        norm_rows(w.stream, &self.input_norm, norm_eps, w.normed);
        let qkv = [(&self.query, &mut *w.queries), (&self.key, &mut *w.keys), (&self.value, &mut *w.values)];
        forward_all(qkv, w.normed, w.adapters, w.scratch)?;
        if let Some([query, key]) = &self.head_norms {
            w.queries.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, query, norm_eps));
            w.keys.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, key, norm_eps));
        }
        let pairs = head_dim / 2;
        let angles = w.cos.chunks_exact(pairs).zip(w.sin.chunks_exact(pairs));
        let rows = w.queries.chunks_exact_mut(q_width).zip(w.keys.chunks_exact_mut(kv_width));
        for ((queries, keys), (cos, sin)) in rows.zip(angles) {
            rotate(queries, head_dim, cos, sin);
            rotate(keys, head_dim, cos, sin);
        }
        let each = scratch_len(w.positions, head_dim);
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

fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let rows = x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len()));
    rows.for_each(|(x, out)| rms_norm(x, weight, eps, out));
}

fn add(stream: &mut [f32], branch: &[f32]) {
    stream.iter_mut().zip(branch).for_each(|(s, b)| *s += b);
}

/// Where layers come from, and what has been read already.
struct Loader<'a, 'p> {
    source: &'a dyn TensorSource,
    settings: Settings,
    unused: Unused,
    done: usize,
    all: usize,
    progress: &'p mut dyn FnMut(usize, usize),
}

impl Loader<'_, '_> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        self.unused.take(name);
        vector(self.source, name, len)
    }

    fn matrix(&mut self, module: &str, shape: [usize; 2]) -> Result<Matrix, Error> {
        let name = format!("{module}.weight");
        self.unused.take(&name);
        Matrix::load(self.source, &name, shape)
    }

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Error> {
        self.linear_with(module, shape, bias, &self.settings.clone())
    }

    fn linear_with(
        &mut self,
        module: &str,
        shape: [usize; 2],
        bias: bool,
        settings: &Settings,
    ) -> Result<Linear, Error> {
        (self.progress)(self.done, self.all);
        self.done += 1;
        self.unused.take(&format!("{module}.weight"));
        self.unused.take(&format!("{module}.bias"));
        Linear::load(self.source, module, shape, bias, settings)
    }
}
