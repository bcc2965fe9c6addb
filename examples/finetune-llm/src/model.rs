//! The decoder: loading, the loss, and the gradients of all variables.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Error, Tensor};
use candle_nn::VarMap;
use nf4::checkpoint::{FloatType, Linear4bit, PeftAdapter, TensorSource};
use nf4::{Arithmetic, BlockSize, Kernels, LoRAAdapter, LoRAScaling, Quantized4Bit};
use nf4_candle::{Nf4Linear, QLoRALinear, function};
use nf4_llama::Config;
use nf4_llama::program::Awake;

use crate::attention::Attention;
use crate::block::{Block, Kept, Place, Scratch};
use crate::head::cross_entropy;
use crate::linear::Linear;
use crate::ops::{Angles, rms_norm, rms_norm_backward, space};
use crate::pack::Sequence;

/// The linear layers of a block, as `config.json` and PEFT call them.
pub(crate) const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A decoder of the Llama family whose linear layers are NF4, some of them with an adapter.
///
/// The weights of a checkpoint that is not quantized are quantized, as `nf4 quantize` does it; linear layers that a quantized
/// one left dense stay so, without an adapter. Embedding, head and norms are f32.
#[derive(Debug)]
pub struct Llama {
    decoder: Arc<Decoder>,
    /// Buffers of a forward and its backward.
    spare: Arc<Mutex<Option<Buffers>>>,
}

#[derive(Debug)]
struct Decoder {
    config: Config,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Arc<[f32]>,
    /// `[vocabulary, hidden]`; the embedding itself where that is the head.
    head: Tensor,
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
    /// Whether new adapters have the magnitude of `DoRA`.
    pub dora: bool,
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
        Ok(Self { decoder: Arc::new(Decoder { config, embedding, blocks, norm, head }), spare: Arc::default() })
    }

    /// Sizes and variants.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.decoder.config
    }

    /// The layers with an adapter.
    pub fn trained(&self) -> impl Iterator<Item = &QLoRALinear> {
        self.decoder.blocks.iter().flat_map(|block| &block.linears).filter_map(|linear| match linear {
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
            None => {
                let layer = Nf4Linear::new(weight, bias)?.with_arithmetic(self.arithmetic);
                Linear::Frozen(layer.with_threads(Arc::new(Awake)))
            }
            Some(adapter) => {
                let layer = QLoRALinear::new(module, weight, bias, &adapter, self.vars)?;
                let layer = layer.with_arithmetic(self.arithmetic);
                Linear::Trained(Box::new(layer.with_threads(Arc::new(Awake))))
            }
        })
    }

    fn fresh(&self, module: &str, [d_out, d_in]: [usize; 2]) -> Result<LoRAAdapter> {
        let Adapters { rank, alpha, scaling, dora, seed, .. } = *self.adapters;
        // FNV-1a of the name, so that layers differ.
        let own = module.bytes().fold(0xcbf2_9ce4_8422_2325_u64 ^ seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let adapter = LoRAAdapter::new(d_out, d_in, rank, alpha, scaling, own)?;
        Ok(if dora { adapter.with_dora() } else { adapter })
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

/// What a step works in.
#[derive(Debug, Default)]
struct Buffers {
    /// Of each block; of one alone where nothing is trained.
    kept: Vec<Kept>,
    scratch: Scratch,
    /// `[tokens, hidden]`: what goes through the blocks.
    x: Vec<f32>,
    /// The rows of `x` that predict something, what the last norm makes of them, and the gradient of that.
    last: Vec<f32>,
    normed: Vec<f32>,
    of_normed: Vec<f32>,
}

/// The forward pass.
impl Llama {
    /// The sum of the cross entropies of a sequence's targets, a scalar, and how many there are. Documents of the sequence do
    /// not see each other. If `trains` is false, nothing is kept for a backward.
    ///
    /// The whole model is one operation of candle, which computes the gradients of all variables together.
    ///
    /// # Errors
    /// A message for a token that is not in the vocabulary; those of candle.
    pub fn loss(&self, sequence: &Sequence, trains: bool) -> Result<(Tensor, usize)> {
        let decoder = &self.decoder;
        let (rows, targets) = sequence.targets();
        let rows: Vec<usize> = rows.into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
        let mut buffers = self.spare().take().unwrap_or_default();
        let place = decoder.hidden(sequence, trains, &mut buffers)?;
        let width = decoder.config.hidden;
        let Buffers { x, last, normed, of_normed, .. } = &mut buffers;
        let last = space(last, rows.len() * width);
        for (row, last) in rows.iter().zip(last.chunks_exact_mut(width)) {
            last.copy_from_slice(&x[row * width..][..width]);
        }
        rms_norm(last, &decoder.norm, decoder.config.norm_eps, space(normed, last.len()));
        let of_normed = space(of_normed, last.len());
        let loss = cross_entropy(normed, &decoder.head, &targets, trains.then_some(of_normed))?;
        #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
        let loss = Tensor::new(loss as f32, &Device::Cpu)?;
        if !trains {
            *self.spare() = Some(buffers);
            return Ok((loss, targets.len()));
        }
        let variables: Vec<Tensor> = self.trained().flat_map(QLoRALinear::variables).cloned().collect();
        let (decoder, spare, buffers) = (decoder.clone(), self.spare.clone(), Mutex::new(Some(buffers)));
        let backward = move |by_loss: &Tensor| {
            let buffers = buffers.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut buffers = buffers.ok_or_else(|| Error::Msg("a loss has one backward".to_string()))?;
            let gradients = decoder.backward(by_loss.to_scalar()?, &rows, &place, &mut buffers)?;
            *spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(buffers);
            Ok(gradients)
        };
        Ok((function(&loss, &variables, backward)?, targets.len()))
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Option<Buffers>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The logits of every token, `[tokens, vocabulary]`.
    ///
    /// # Errors
    /// The errors of [`Self::loss`].
    pub fn logits(&self, sequence: &Sequence) -> Result<Tensor> {
        let Decoder { config, norm, head, .. } = &*self.decoder;
        let mut buffers = Buffers::default();
        self.decoder.hidden(sequence, false, &mut buffers)?;
        rms_norm(&buffers.x, norm, config.norm_eps, space(&mut buffers.normed, buffers.x.len()));
        let x = Tensor::from_vec(buffers.normed, (sequence.tokens().len(), config.hidden), &Device::Cpu)?;
        Ok(x.matmul(&head.t()?)?)
    }
}

impl Decoder {
    /// Puts what goes into the last norm in `x`.
    fn hidden(&self, sequence: &Sequence, trains: bool, buffers: &mut Buffers) -> Result<Place> {
        let tokens = sequence.tokens();
        if let Some(token) =
            tokens.iter().find(|token| usize::try_from(**token).is_ok_and(|t| t >= self.config.vocabulary))
        {
            bail!("token {token} is not in the vocabulary of {}", self.config.vocabulary);
        }
        let place = place(&self.config, sequence);
        let tokens = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        let Buffers { kept, scratch, x, .. } = buffers;
        *x = self.embedding.index_select(&tokens, 0)?.flatten_all()?.to_vec1()?;
        kept.resize_with(kept.len().max(if trains { self.blocks.len() } else { 1 }), Kept::default);
        for (i, block) in self.blocks.iter().enumerate() {
            let kept = &mut kept[if trains { i } else { 0 }];
            block.forward(x, &self.config, &place, kept, scratch)?;
        }
        Ok(place)
    }

    /// The gradients of all variables, in the order of [`Llama::trained`], for the gradient of the loss.
    fn backward(
        &self,
        by_loss: f32,
        rows: &[usize],
        place: &Place,
        buffers: &mut Buffers,
    ) -> candle_core::Result<Vec<Vec<f32>>> {
        let Buffers { kept, scratch, x: dx, last, normed, of_normed } = buffers;
        of_normed.iter_mut().for_each(|gradient| *gradient *= by_loss);
        // The normed rows are not needed any more: the gradients of what they were made from take their place.
        normed.fill(0.0);
        rms_norm_backward(last, &self.norm, self.config.norm_eps, of_normed, normed);
        let width = self.config.hidden;
        dx.fill(0.0);
        for (row, gradient) in rows.iter().zip(normed.chunks_exact(width)) {
            dx[row * width..][..width].copy_from_slice(gradient);
        }
        let mut gradients = Vec::with_capacity(self.blocks.len());
        for (i, (block, kept)) in self.blocks.iter().zip(kept).enumerate().rev() {
            gradients.push(block.backward(dx, i == 0, &self.config, place, kept, scratch)?);
        }
        Ok(gradients.into_iter().rev().flatten().collect())
    }
}

/// Where the tokens of a sequence stand, each in its document.
fn place(config: &Config, sequence: &Sequence) -> Place {
    let documents: Vec<_> = sequence.documents().filter(|document| !document.is_empty()).collect();
    let (pairs, tokens) = (config.rope.pairs(), sequence.tokens().len());
    let (mut cos, mut sin) = (vec![0.0; tokens * pairs], vec![0.0; tokens * pairs]);
    let positions = documents.iter().flat_map(|document| 0..document.len());
    for ((position, cos), sin) in positions.zip(cos.chunks_exact_mut(pairs)).zip(sin.chunks_exact_mut(pairs)) {
        config.rope.angles(position, cos, sin);
    }
    let Config { heads, kv_heads, head_dim, .. } = *config;
    let attention = Attention { heads, kv_heads, head_dim, documents, kernels: Kernels::detect() };
    Place { angles: Angles { cos, sin, pairs }, attention }
}
