//! Loading of a model, layer by layer.

use alloc::format;
use alloc::vec::Vec;

use nf4::checkpoint::TensorSource;

use super::block::Block;
use super::{Model, Options};
use crate::config::Config;
use crate::error::Error;
use crate::linear::{Linear, Settings};
use crate::matrix::Matrix;
use crate::threads::Pool;
use crate::weights::{Unused, vector};

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
