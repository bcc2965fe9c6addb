//! The decoder, with autograd.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_nn::{Module, VarMap};
use nf4::checkpoint::{FloatType, Linear4bit, PeftAdapter, TensorSource};
use nf4::{Arithmetic, BlockSize, LoRAAdapter, LoRAScaling, Quantized4Bit};
use nf4_candle::{Nf4Linear, QLoRALinear};
use nf4_llama::Config;

use crate::head::cross_entropy;
use crate::ops::{Angles, causal_softmax, dense, rms_norm, rotate, silu_times};
use crate::pack::Sequence;

/// The linear layers of a block, as `config.json` and PEFT call them.
pub(crate) const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A decoder of the Llama family whose linear layers are NF4, some of them with an adapter.
///
/// The weights of a checkpoint that is not quantized are quantized, as `nf4 quantize` does it; linear layers that a quantized
/// one left dense stay so, without an adapter. Embedding, head and norms are f32.
#[derive(Debug)]
pub struct Llama {
    config: Config,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Arc<[f32]>,
    /// `[vocabulary, hidden]`; the embedding itself where that is the head.
    head: Tensor,
}

#[derive(Debug)]
struct Block {
    input_norm: Arc<[f32]>,
    /// In the order of [`LINEARS`].
    linears: Vec<Linear>,
    head_norms: Option<[Arc<[f32]>; 2]>,
    post_norm: Arc<[f32]>,
}

#[derive(Debug)]
enum Linear {
    Frozen(Nf4Linear),
    Trained(Box<QLoRALinear>),
    /// Left dense by a checkpoint that is quantized; it has no adapter.
    Dense {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    fn forward(&self, x: &Tensor, trains: bool) -> candle_core::Result<Tensor> {
        match self {
            Self::Frozen(layer) => layer.forward(x),
            Self::Trained(layer) if trains => layer.forward(x),
            Self::Trained(layer) => layer.forward_detached(x),
            Self::Dense { weight, bias } => match (dense(x, weight)?, bias) {
                (y, Some(bias)) => y.broadcast_add(bias),
                (y, None) => Ok(y),
            },
        }
    }
}

/// Which layers get an adapter, and which one.
#[derive(Debug, Clone)]
pub struct Adapters<'a> {
    /// Names from [`LINEARS`].
    pub targets: &'a [String],
    /// Rank of new adapters.
    pub rank: usize,
    /// Alpha of new adapters.
    pub alpha: f64,
    /// How rank and alpha give the scale of new adapters.
    pub scaling: LoRAScaling,
    /// The start of the random numbers of `A`; each layer has its own.
    pub seed: u64,
    /// The adapter to start with, in place of new ones.
    pub start: Option<&'a PeftAdapter>,
}

/// Loading.
impl Llama {
    /// Reads a model; the variables of its adapters are added to `vars`.
    ///
    /// # Errors
    /// If a tensor is missing, or is not what `config` needs; the message names it.
    pub fn load(
        config: Config,
        source: &dyn TensorSource,
        arithmetic: Arithmetic,
        adapters: &Adapters<'_>,
        vars: &VarMap,
    ) -> Result<Self> {
        let embedding = matrix(source, "model.embed_tokens.weight", [config.vocabulary, config.hidden])?;
        let mut blocks = Vec::with_capacity(config.layers);
        let mut used = 0;
        for index in 0..config.layers {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let norm = |part: &str, len| vector(source, &name(part), len);
            let head_norms = if config.qk_norm {
                let norm = |part| norm(part, config.head_dim);
                Some([norm("self_attn.q_norm.weight")?, norm("self_attn.k_norm.weight")?])
            } else {
                None
            };
            let mut linears = Vec::with_capacity(LINEARS.len());
            for part in LINEARS {
                let module = name(&format!("{}.{part}", if part.len() == 6 { "self_attn" } else { "mlp" }));
                let loader = Loader { source, config: &config, arithmetic, adapters, vars };
                let linear = loader.linear(&module, part).with_context(|| module.clone())?;
                used += usize::from(matches!(linear, Linear::Trained(_)));
                linears.push(linear);
            }
            blocks.push(Block {
                input_norm: norm("input_layernorm.weight", config.hidden)?,
                linears,
                head_norms,
                post_norm: norm("post_attention_layernorm.weight", config.hidden)?,
            });
        }
        if let Some(start) = adapters.start {
            let all = start.modules().count();
            ensure!(used == all, "the adapter has {all} modules, of which the model has {used}");
        }
        ensure!(used > 0, "no layer of the model has an adapter: nothing to train");
        let norm = vector(source, "model.norm.weight", config.hidden)?;
        let head = if config.tied {
            embedding.clone()
        } else {
            matrix(source, "lm_head.weight", [config.vocabulary, config.hidden])?
        };
        Ok(Self { config, embedding, blocks, norm, head })
    }

    /// Sizes and variants.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layers with an adapter.
    pub fn trained(&self) -> impl Iterator<Item = &QLoRALinear> {
        self.blocks.iter().flat_map(|block| &block.linears).filter_map(|linear| match linear {
            Linear::Trained(layer) => Some(&**layer),
            _ => None,
        })
    }
}

enum Weight {
    Packed(Quantized4Bit),
    Dense(Tensor),
}

struct Loader<'a> {
    source: &'a dyn TensorSource,
    config: &'a Config,
    arithmetic: Arithmetic,
    adapters: &'a Adapters<'a>,
    vars: &'a VarMap,
}

impl Loader<'_> {
    fn linear(&self, module: &str, part: &str) -> Result<Linear> {
        let Config { hidden, intermediate, .. } = *self.config;
        let (q, kv) = (self.config.q_width(), self.config.kv_width());
        let (shape, has_bias) = match part {
            "q_proj" => ([q, hidden], self.config.qkv_bias),
            "k_proj" | "v_proj" => ([kv, hidden], self.config.qkv_bias),
            "o_proj" => ([hidden, q], self.config.output_bias),
            "down_proj" => ([hidden, intermediate], self.config.mlp_bias),
            _ => ([intermediate, hidden], self.config.mlp_bias),
        };
        let (weight, bias) = self.weight(module, shape)?;
        ensure!(bias.is_some() == has_bias, "a bias is {}", if has_bias { "missing" } else { "not expected" });
        let weight = match weight {
            Weight::Packed(weight) => weight,
            Weight::Dense(weight) => {
                let bias = bias.map(|bias| Tensor::from_slice(&bias, bias.len(), &Device::Cpu)).transpose()?;
                return Ok(Linear::Dense { weight, bias });
            }
        };
        let adapter = match self.adapters.start {
            Some(start) => start.module(module).map(|module| module.adapter().clone()),
            None if self.adapters.targets.iter().any(|target| target == part) => Some(self.fresh(module, shape)?),
            None => None,
        };
        Ok(match adapter {
            None => Linear::Frozen(Nf4Linear::new(weight, bias)?.with_arithmetic(self.arithmetic)),
            Some(adapter) => {
                let layer = QLoRALinear::new(module, weight, bias, &adapter, self.vars)?;
                Linear::Trained(Box::new(layer.with_arithmetic(self.arithmetic)))
            }
        })
    }

    fn fresh(&self, module: &str, [d_out, d_in]: [usize; 2]) -> Result<LoRAAdapter> {
        let Adapters { rank, alpha, scaling, seed, .. } = *self.adapters;
        // FNV-1a of the name, so that layers differ.
        let own = module.bytes().fold(0xcbf2_9ce4_8422_2325_u64 ^ seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Ok(LoRAAdapter::new(d_out, d_in, rank, alpha, scaling, own)?)
    }

    /// The weight and the bias of a module.
    fn weight(&self, module: &str, shape: [usize; 2]) -> Result<(Weight, Option<Vec<f32>>)> {
        let [d_out, d_in] = shape;
        if self.source.info(&format!("{module}.weight.absmax")).is_some() {
            let (weight, bias) = Linear4bit::load(self.source, module)?.into_parts();
            let got = [weight.rows(), weight.cols()];
            ensure!(got == shape, "a weight of {got:?} where {shape:?} is expected");
            return Ok((Weight::Packed(weight), bias));
        }
        let values = values(self.source, &format!("{module}.weight"), &shape)?;
        let weight = match self.config.quantization {
            None => Weight::Packed(Quantized4Bit::quantize(&values, d_out, d_in, BlockSize::B64, false)?),
            Some(_) => Weight::Dense(Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?),
        };
        let bias = format!("{module}.bias");
        let bias = self.source.info(&bias).map(|_| self::values(self.source, &bias, &[d_out])).transpose()?;
        Ok((weight, bias))
    }
}

/// A tensor as f32, if it has this shape and is finite.
fn values(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let info = source.info(name).with_context(|| format!("{name} is missing"))?;
    ensure!(info.shape == shape, "{name} is {:?}; expected {shape:?}", info.shape);
    let Some(float) = FloatType::from_dtype(info.dtype) else {
        bail!("{name} is {}, not F32, F16 or BF16", info.dtype)
    };
    let values = float.values(&source.read(name)?);
    let bad = values.iter().position(|value| !value.is_finite());
    bad.map_or(Ok(()), |index| Err(anyhow::anyhow!("{name}: value {index} is {}", values[index])))?;
    Ok(values)
}

fn vector(source: &dyn TensorSource, name: &str, len: usize) -> Result<Arc<[f32]>> {
    Ok(values(source, name, &[len])?.into())
}

fn matrix(source: &dyn TensorSource, name: &str, shape: [usize; 2]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values(source, name, &shape)?, shape.as_slice(), &Device::Cpu)?)
}

/// The forward pass.
impl Llama {
    /// The sum of the cross entropies of a sequence's targets, a scalar, and how many there are. Documents of the sequence do
    /// not see each other. If `trains` is false, nothing is kept for a backward.
    ///
    /// # Errors
    /// A message for a token that is not in the vocabulary; those of candle.
    pub fn loss(&self, sequence: &Sequence, trains: bool) -> Result<(Tensor, usize)> {
        let hidden = self.hidden(sequence, trains)?;
        let (rows, targets) = sequence.targets();
        let count = targets.len();
        let rows = Tensor::from_vec(rows, count, hidden.device())?;
        let x = rms_norm(&hidden.index_select(&rows, 0)?, &self.norm, self.config.norm_eps)?;
        Ok((cross_entropy(&x, &self.head, &targets)?, count))
    }

    /// The logits of every token, `[tokens, vocabulary]`.
    ///
    /// # Errors
    /// The errors of [`Self::loss`].
    pub fn logits(&self, sequence: &Sequence) -> Result<Tensor> {
        let x = rms_norm(&self.hidden(sequence, false)?, &self.norm, self.config.norm_eps)?;
        Ok(x.matmul(&self.head.t()?)?)
    }

    /// What goes into the last norm, `[tokens, hidden]`.
    fn hidden(&self, sequence: &Sequence, trains: bool) -> Result<Tensor> {
        let tokens = sequence.tokens();
        if let Some(token) =
            tokens.iter().find(|token| usize::try_from(**token).is_ok_and(|t| t >= self.config.vocabulary))
        {
            bail!("token {token} is not in the vocabulary of {}", self.config.vocabulary);
        }
        let places = Place::new(&self.config, sequence);
        let tokens = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        let mut x = self.embedding.index_select(&tokens, 0)?;
        for block in &self.blocks {
            x = block.forward(&x, &self.config, &places, trains)?;
        }
        Ok(x)
    }
}

/// Where the tokens of a sequence stand.
struct Place {
    angles: Angles,
    /// Of each token in its document.
    positions: Arc<[usize]>,
    /// Start and length of each document.
    documents: Vec<(usize, usize)>,
}

impl Place {
    fn new(config: &Config, sequence: &Sequence) -> Self {
        let documents: Vec<(usize, usize)> = sequence.documents().map(|range| (range.start, range.len())).collect();
        let longest = documents.iter().map(|(_, len)| *len).max().unwrap_or(0);
        let pairs = config.rope.pairs();
        let (mut cos, mut sin) = (vec![0.0; longest * pairs], vec![0.0; longest * pairs]);
        for (position, (cos, sin)) in cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs)).enumerate() {
            config.rope.angles(position, cos, sin);
        }
        Self {
            angles: Angles { cos: cos.into(), sin: sin.into(), pairs },
            positions: documents.iter().flat_map(|(_, len)| 0..*len).collect(),
            documents,
        }
    }
}

impl Block {
    fn forward(&self, x: &Tensor, config: &Config, place: &Place, trains: bool) -> candle_core::Result<Tensor> {
        let [query, key, value, output, gate, up, down] = self.linears.as_slice() else {
            return Err(candle_core::Error::Msg("a block has seven linear layers".to_string()));
        };
        let normed = rms_norm(x, &self.input_norm, config.norm_eps)?;
        let heads =
            |linear: &Linear, count: usize| linear.forward(&normed, trains)?.reshape(((), count, config.head_dim));
        let (mut q, mut k) = (heads(query, config.heads)?, heads(key, config.kv_heads)?);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            (q, k) = (rms_norm(&q, q_norm, config.norm_eps)?, rms_norm(&k, k_norm, config.norm_eps)?);
        }
        let q = rotate(&q, &place.angles, &place.positions)?;
        let k = rotate(&k, &place.angles, &place.positions)?;
        let v = heads(value, config.kv_heads)?;
        let mut parts = Vec::with_capacity(place.documents.len());
        for &(start, len) in &place.documents {
            let [q, k, v] = [&q, &k, &v].map(|all| all.narrow(0, start, len));
            parts.push(attention(&q?, &k?, &v?, config)?);
        }
        let attended = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0)? };
        let x = (x + output.forward(&attended, trains)?)?;

        let normed = rms_norm(&x, &self.post_norm, config.norm_eps)?;
        let inner = silu_times(&gate.forward(&normed, trains)?, &up.forward(&normed, trains)?)?;
        x + down.forward(&inner, trains)?
    }
}

/// Attention within a document: `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`; the result is
/// `[tokens, heads * head_dim]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, config: &Config) -> candle_core::Result<Tensor> {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    let tokens = q.dim(0)?;
    let [q, k, v] = [q, k, v].map(|x| x.transpose(0, 1)?.contiguous());
    // The heads that share a key and a value, below each other.
    let group = heads / kv_heads;
    let q = q?.reshape((kv_heads, group * tokens, head_dim))?;
    let scores = q.matmul(&k?.transpose(1, 2)?.contiguous()?)?.reshape((heads, tokens, tokens))?;
    #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let weights = causal_softmax(&scores, scale)?.reshape((kv_heads, group * tokens, tokens))?;
    let mixed = weights.matmul(&v?)?.reshape((heads, tokens, head_dim))?;
    mixed.transpose(0, 1)?.reshape((tokens, heads * head_dim))
}
