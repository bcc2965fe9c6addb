//! `nf4 quantize`: the Linear weights of a model become 4-bit layers of `bitsandbytes`.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use nf4::checkpoint::{
    Entry, FloatType, Linear4bit, ModelConfig, QuantState, Quantization, QuantizationConfig, TensorInfo, TensorSource,
    foreign_tensors, packed_tensors,
};
use nf4::{AbsmaxBuf, BlockSize, Kernels, Quantized4Bit, packed_len};
use safetensors::Dtype;
use serde_json::json;

use crate::Global;
use crate::build::{Buffers, Conversion, Job, Step, Target, build};
use crate::memory;
use crate::model::Model;
use crate::progress::Progress;
use crate::report::Prepared;
use crate::rule::{Layout, Rule, Wishes};
use crate::text::{Text, bytes};
use crate::verify::NOT_GATHERED;

/// Quantize the Linear weights of a model to NF4, so that transformers loads it as 4-bit.
///
/// The bytes are those of bitsandbytes. The weights that transformers would quantize in this architecture are quantized; all
/// other tensors are copied bit for bit: embeddings, norms, the output head, routers and experts. `config.json` gets a
/// `quantization_config`, with a list of the skipped modules where it is needed. Shards stay shards. The tokenizer and other
/// small files are copied; subdirectories and weights in other formats are not.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nf4 quantize Llama-3.2-1B --out Llama-3.2-1B-nf4 --double-quant
  nf4 quantize gemma-3-4b-it --out gemma-3-4b-it-nf4 --skip model.vision_tower model.multi_modal_projector
  nf4 quantize layer.safetensors --out layer-nf4.safetensors --block-size 128")]
pub(crate) struct Quantize {
    /// A model directory or a safetensors file
    model: PathBuf,
    #[command(flatten)]
    target: Target,
    /// Weights that share a scale: 32, 64, 128, ..., 4096. Loaders read it from the file
    #[arg(long, default_value = "64", value_name = "N", value_parser = block_size)]
    block_size: BlockSize,
    /// Quantize the scales too: 4.127 bits per weight instead of 4.5, at block size 64
    #[arg(long)]
    double_quant: bool,
    /// More modules to leave as they are: the end of their names, or a regular expression for the start up to a dot, as
    /// transformers 5 compares `llm_int8_skip_modules` (`--skip down_proj model.layers.0 '.*self_attn'`)
    #[arg(long, value_name = "MODULE", num_args = 1.., value_delimiter = ',')]
    skip: Vec<String>,
    /// Quantize the output head (`lm_head`) as well, which transformers by itself does not
    #[arg(long)]
    quantize_head: bool,
    /// The type in which transformers multiplies [default: the type of the first quantized weight]
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    compute_dtype: Option<FloatType>,
}

/// A weight to be quantized.
struct Weight {
    module: String,
    layout: Layout,
    /// With the shape of the layer, `[out, in]`.
    state: QuantState,
}

impl Quantize {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let start = Instant::now();
        let model = Model::open(&self.model)?;
        check_is_dense(&model)?;
        let config = model.config_fields()?;
        let tensors: Vec<_> = model.names().filter_map(|name| Some((name, model.info(name)?))).collect();
        let wishes = Wishes { skip: &self.skip, head: self.quantize_head };
        let rule = Rule::new(config.as_ref(), &tensors, wishes).with_context(|| model.path.display().to_string())?;
        let state = |name: &str, info: &TensorInfo| self.weight(&rule, name, info);
        let weights: Vec<Weight> = model.names().filter_map(|name| state(name, model.info(name)?)).collect();
        let Some(first) = weights.first() else {
            bail!(
                "{}: nothing to quantize: no Linear weight in F32, F16 or BF16 among {} tensors that is not skipped",
                model.path.display(),
                model.names().count()
            );
        };
        let mut config = QuantizationConfig::default();
        config.double_quant = self.double_quant;
        config.compute_dtype = self.compute_dtype.unwrap_or(first.state.dtype);
        config.skip_modules = rule.skip_modules.clone();
        let progress = Progress::new("quantize", model.data_len(), global.quiet);
        let conversion = Conversion4bit { command: self, model: &model, rule: &rule, config: &config };
        let built = build(&model, &self.target, &model.inputs, global.threads, &progress, &conversion)?;
        drop(progress);

        let seconds = start.elapsed().as_secs_f64();
        let elements: u64 = weights.iter().map(|w| w.state.shape.iter().product::<usize>() as u64).sum();
        let (before, after) = (model.data_len(), built.bytes);
        let mut text = Text::default();
        text.line(format_args!(
            "{}: {} weights of {} tensors quantized, {} -> {}, {seconds:.2} s",
            self.target.out.display(),
            weights.len(),
            model.names().count(),
            bytes(before),
            bytes(after),
        ));
        for warning in &rule.warnings {
            text.line(format_args!("warning: {warning}"));
        }
        left(&built.left, &mut text);
        let json = json!({
            "output": self.target.out.to_string_lossy(),
            "warnings": rule.warnings,
            "block_size": self.block_size.get(),
            "double_quant": self.double_quant,
            "skip_modules": rule.skip_modules,
            "quantized": weights.iter().map(|w| &w.module).collect::<Vec<_>>(),
            "quantized_weights": elements,
            "bytes_before": before,
            "bytes_after": after,
            "not_copied": built.left,
            "seconds": seconds,
        });
        Ok(Prepared::output(built.output, text, json))
    }

    /// What a tensor becomes if it is to be quantized.
    fn weight(&self, rule: &Rule, name: &str, info: &TensorInfo) -> Option<Weight> {
        let (layout, module) = (rule.layout(name)?, name.strip_suffix(".weight")?.to_owned());
        let mut shape = info.shape.clone();
        if layout == Layout::Transposed {
            shape.reverse();
        }
        let state = QuantState {
            shape,
            block_size: self.block_size,
            dtype: FloatType::from_dtype(info.dtype)?,
            quant_storage: Dtype::U8,
            nested_offset: self.double_quant.then_some(0.0),
        };
        Some(Weight { module, layout, state })
    }
}

/// What the command does to a model.
struct Conversion4bit<'a> {
    command: &'a Quantize,
    model: &'a Model,
    rule: &'a Rule,
    config: &'a QuantizationConfig,
}

impl Conversion for Conversion4bit<'_> {
    type How = Weight;

    fn step(&self, name: &str) -> Result<Step<Weight>> {
        let weight = self.model.info(name).and_then(|info| self.command.weight(self.rule, name, info));
        let Some(weight) = weight else { return Ok(Step::Copy) };
        let mut entries: Vec<Entry> = weight
            .state
            .tensor_infos(&format!("{}.weight", weight.module))?
            .iter()
            .map(|(name, info)| Entry::new(name, info.dtype, &info.shape))
            .collect();
        if let Some(json) = entries.last_mut() {
            json.is_late = true;
        }
        Ok(Step::Make(weight, entries))
    }

    /// Quantizes a weight in chunks of whole blocks, and writes the layer.
    fn make(&self, name: &str, weight: Weight, job: &mut Job<'_, Buffers>) -> Result<()> {
        let Quantize { block_size, double_quant, .. } = *self.command;
        let [rows, cols] = weight.state.matrix_shape()?;
        let (elements, dtype) = (rows * cols, weight.state.dtype);
        let at = || job.shard.at(name);
        let mut packed = memory::filled(packed_len(elements), 0).with_context(at)?;
        let mut absmax = memory::filled(block_size.blocks(elements), 0.0).with_context(at)?;
        let source = Source { name, dtype, layout: weight.layout, shape: [rows, cols] };
        quantize_chunks(source, block_size, &mut packed, &mut absmax, job)?;
        let scales = if double_quant { AbsmaxBuf::double_quantize(&absmax)? } else { AbsmaxBuf::plain(absmax) };
        let quantized = Quantized4Bit::from_parts(packed, scales, rows, cols, block_size);
        let layer = Linear4bit::new(quantized.with_context(|| job.shard.at(name))?, dtype);
        let json = weight.state.tensor_infos(&format!("{}.weight", weight.module))?.pop().map(|(name, _)| name);
        for (name, tensor) in layer.tensors(&weight.module) {
            if json.as_ref() == Some(&name) {
                job.writer.set_late(&name, tensor.bytes().to_vec());
            } else {
                job.writer.write(&name, 0, tensor.bytes())?;
            }
        }
        Ok(())
    }

    fn config(&self, old: &[u8]) -> Result<String> {
        Ok(self.config.insert_into(old)?)
    }
}

/// Weights of a chunk: whole blocks of every size, and few enough for the cache.
const CHUNK: usize = 1 << 17;

/// Where the weights of a layer of shape `[out, in]` are.
#[derive(Clone, Copy)]
struct Source<'a> {
    name: &'a str,
    dtype: FloatType,
    layout: Layout,
    shape: [usize; 2],
}

fn quantize_chunks(
    source: Source<'_>,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
    job: &mut Job<'_, Buffers>,
) -> Result<()> {
    let Job { shard, progress, .. } = *job;
    let Source { name, dtype, layout, shape: [rows, cols] } = source;
    let kernels = Kernels::detect();
    // The rows of a transposed layer are strewn over the whole tensor, which is therefore read at once.
    let stored = match layout {
        Layout::Linear => Vec::new(),
        Layout::Transposed => shard.read(name).with_context(|| shard.at(name))?,
    };
    let in_file = |index: usize| match layout {
        Layout::Linear => index,
        Layout::Transposed => index % cols * rows + index / cols,
    };
    // A chunk of weights has its own part of the outputs.
    let chunks = packed.chunks_mut(CHUNK / 2).zip(absmax.chunks_mut(CHUNK / block_size.get()));
    let outputs: Vec<_> = chunks.map(Mutex::new).collect();
    job.workers.run(rows * cols, CHUNK, |buffers, part| {
        let (size, length) = (dtype.size(), part.len() * dtype.size());
        memory::resize(&mut buffers.bytes, length, 0)?;
        if layout == Layout::Transposed {
            for (to, index) in buffers.bytes.chunks_exact_mut(size).zip(part.clone()) {
                to.copy_from_slice(&stored[in_file(index) * size..][..size]);
            }
        } else {
            shard.read_part(name, (part.start * size) as u64, &mut buffers.bytes)?;
        }
        let mut weights = Vec::with_capacity(part.len());
        dtype.extend_values(&buffers.bytes, &mut weights);
        let mut output = outputs[part.start / CHUNK].lock().expect("each chunk has one thread");
        let (packed, absmax) = &mut *output;
        kernels.quantize(&weights, block_size, packed, absmax)?;
        if absmax.iter().any(|a| !a.is_finite()) {
            let at = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
            let (index, value) = (in_file(part.start + at), weights[at]);
            let width = if layout == Layout::Transposed { rows } else { cols };
            bail!("{}: weight [{}, {}] is {value}, which is not finite", shard.at(name), index / width, index % width);
        }
        progress.add(size as u64);
        Ok(())
    })
}

/// `Ok` if the model is not quantized yet.
fn check_is_dense(model: &Model) -> Result<()> {
    let at = model.path.display();
    if let Some(tensor) = packed_tensors(model).first() {
        bail!("{at}: {tensor} is a 4-bit layer already; `nf4 dequantize` makes it plain again");
    }
    let section = model.config_fields()?.and_then(|config| config.get("quantization_config").cloned());
    if section.is_some_and(|section| !section.is_null() && !section.is_object()) {
        bail!("{at}: config.json: quantization_config is not an object");
    }
    let config = model.config.as_deref().map(ModelConfig::parse).transpose().with_context(|| at.to_string())?;
    match config.map_or(Quantization::None, |config| config.quantization()) {
        Quantization::None => {}
        Quantization::FourBit => {
            bail!("{at}: config.json says that the model is quantized already (bitsandbytes, 4 bits)")
        }
        Quantization::Other { method, .. } => {
            bail!("{at}: config.json says that the model is quantized already ({method})")
        }
    }
    if let Some(tensor) = foreign_tensors(model).first() {
        bail!("{at}: {}", tensor.error("is quantized already"));
    }
    let is_empty = |name: &&str| name.ends_with("weight") && model.info(name).is_some_and(|info| info.shape == [0]);
    if let Some(name) = model.names().find(is_empty) {
        bail!("{at}: {name}: {NOT_GATHERED}");
    }
    Ok(())
}

/// A line about what was not copied.
pub(crate) fn left(names: &[String], text: &mut Text) {
    if !names.is_empty() {
        text.line(format_args!("not copied: {}", names.join(", ")));
    }
}

pub(crate) fn block_size(text: &str) -> Result<BlockSize, String> {
    let number: usize = text.parse().map_err(|e| format!("{e}"))?;
    BlockSize::new(number).map_err(|e| e.to_string())
}

/// `f32`, `f16`, `bf16`, or the names that PyTorch has for them.
pub(crate) fn float_type(text: &str) -> Result<FloatType, String> {
    match text {
        "f32" => Ok(FloatType::F32),
        "f16" => Ok(FloatType::F16),
        "bf16" => Ok(FloatType::BF16),
        name => FloatType::from_torch_name(name).ok_or_else(|| "expected f32, f16 or bf16".to_owned()),
    }
}
