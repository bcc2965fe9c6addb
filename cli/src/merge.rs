//! `nf4 merge`: a base model and an adapter become one model of plain weights.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nf4::checkpoint::{FloatType, PeftModule, QuantizationConfig, TensorData, TensorInfo, TensorSource};
use serde_json::json;

use crate::Global;
use crate::adapters::Adapter;
use crate::build::{Buffers, Conversion, Job, Step, Target, build};
use crate::dequantize::{How, restore, restored_bytes, step_dense};
use crate::floats::with_float;
use crate::layers::{Layer, Layers, load};
use crate::model::Model;
use crate::progress::Progress;
use crate::quantize::{float_type, left};
use crate::report::Prepared;
use crate::rows::{convert, write_rows};
use crate::text::{Text, bytes};
use crate::writer::Entry;

/// Merge a PEFT adapter into its base model: the result needs neither PEFT nor bitsandbytes.
///
/// Each merged weight is `dequantize(base) + scale * B A` (with DoRA times magnitude over norm), rounded to f32 and
/// then to --dtype; nothing is quantized again. 4-bit layers without an adapter are restored, weights of a base that is
/// not quantized are merged as well, and what the adapter trained as a whole replaces what the base has. All float
/// tensors get the type --dtype; others are copied. A module of the adapter that the base does not have is an error.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nf4 merge Llama-3.2-1B-nf4 --adapter my-adapter --out my-model --dtype bf16")]
pub(crate) struct Merge {
    /// The base: a model directory or a safetensors file, quantized or not
    base: PathBuf,
    /// A directory with adapter_config.json and adapter_model.safetensors
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    target: Target,
    /// The type of the merged model: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = float_type)]
    dtype: FloatType,
}

/// How a tensor of the merged model is made.
enum Make {
    /// As without an adapter.
    Plain(How),
    /// From a 4-bit layer and its adapter.
    Layer(Layer),
    /// From a plain weight and the adapter of this module.
    Dense(String),
    /// From the base's or the adapter's bias, and the bias of `B` of this module.
    Bias(String),
    /// It is the adapter's, converted to a type, or as it is.
    Replace(Option<FloatType>),
}

impl Merge {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let start = Instant::now();
        let model = Model::open(&self.base)?;
        let layers = Layers::read_all(&model)?;
        let adapter = Adapter::open(&self.adapter)?;
        let merger = Merger { base: &model, layers: &layers, adapter: &adapter, dtype: self.dtype };
        merger.check_fits()?;
        let progress = Progress::new("merge", restored_bytes(&model, &layers, Some(self.dtype)), global.quiet);
        let mut inputs = model.inputs.clone();
        inputs.extend(&adapter.inputs);
        let built = build(&model, &self.target, &inputs, global.threads, &progress, &merger)?;
        drop(progress);
        let seconds = start.elapsed().as_secs_f64();
        let merged: Vec<&str> = adapter.peft.modules().map(|(name, _)| name).collect();
        let replaced: Vec<&String> = adapter.peft.replaced().keys().collect();
        let mut text = Text::default();
        text.line(format_args!(
            "{}: {} modules merged, {} tensors replaced, {} -> {}, {seconds:.2} s",
            self.target.out.display(),
            merged.len(),
            replaced.len(),
            bytes(model.data_len()),
            bytes(built.bytes),
        ));
        left(&built.left, &mut text);
        let json = json!({
            "output": self.target.out.to_string_lossy(),
            "merged": merged,
            "replaced": replaced,
            "dtype": self.dtype.torch_name(),
            "bytes_before": model.data_len(),
            "bytes_after": built.bytes,
            "not_copied": built.left,
            "seconds": seconds,
        });
        Ok(Prepared::output(built.output, text, json))
    }
}

impl From<How> for Make {
    fn from(how: How) -> Self {
        Self::Plain(how)
    }
}

/// A base and its adapter, both open.
struct Merger<'a> {
    base: &'a Model,
    layers: &'a Layers,
    adapter: &'a Adapter,
    /// The type of merged and restored weights.
    dtype: FloatType,
}

impl Merger<'_> {
    /// `Ok` if the base has all that the adapter changes, in the same shapes.
    fn check_fits(&self) -> Result<()> {
        let Self { base: model, layers, adapter, .. } = *self;
        let (at, base) = (adapter.path.display(), model.path.display());
        let names: BTreeSet<&str> = model.names().collect();
        for (module, found) in adapter.peft.modules() {
            let weight = format!("{module}.weight");
            let Some(info) = model.info(&weight) else {
                bail!("{at}: module {module} is not in {base}, which has no tensor {weight}");
            };
            let layer = layers.by_weight.get(&weight);
            ensure!(
                layer.is_some() || FloatType::from_dtype(info.dtype).is_some(),
                "{base}: {weight} is {}, which an adapter cannot be merged into",
                info.dtype
            );
            let transposed = layer.is_none() && adapter.peft.config().fan_in_fan_out();
            let shape = match layer {
                Some(layer) => layer.state.matrix_shape()?.to_vec(),
                None => info.shape.clone(),
            };
            let a = found.adapter();
            let expected = if transposed { [a.d_in(), a.d_out()] } else { [a.d_out(), a.d_in()] };
            ensure!(
                shape == expected,
                "{at}: module {module} was made for a weight {expected:?}, but {base} has {shape:?}"
            );
            let bias = format!("{module}.bias");
            ensure!(
                found.lora_bias().is_none() || names.contains(&*bias),
                "{at}: module {module} has a bias to be added, but {base} has no tensor {bias}"
            );
        }
        for (name, tensor) in adapter.peft.replaced() {
            let Some(info) = model.info(name) else { bail!("{at}: {name} is not in {base}") };
            let shape = layers.by_weight.get(name).map_or(&info.shape, |l| &l.state.shape);
            ensure!(
                shape == tensor.shape(),
                "{at}: {name} has the shape {:?}, but {shape:?} in {base}",
                tensor.shape()
            );
        }
        Ok(())
    }
}

impl Conversion for Merger<'_> {
    type How = Make;

    fn step(&self, name: &str) -> Result<Step<Make>> {
        let Self { base: model, layers, adapter, .. } = *self;
        if layers.companions.contains(name) {
            return Ok(Step::Drop);
        }
        let TensorInfo { dtype, shape, .. } = model.info(name).with_context(|| name.to_owned())?;
        let float = FloatType::from_dtype(*dtype);
        let module = |end| name.strip_suffix(end).filter(|m| adapter.peft.module(m).is_some());
        if let (Some(module), Some(_)) = (module(".bias"), float)
            && adapter.peft.module(module).and_then(PeftModule::lora_bias).is_some()
        {
            return Ok(Step::Make(Make::Bias(module.to_owned()), vec![Entry::new(name, self.dtype.dtype(), shape)]));
        }
        let layer = layers.by_weight.get(name);
        if let Some(tensor) = adapter.peft.replaced().get(name) {
            let target = FloatType::from_dtype(tensor.dtype()).map(|_| self.dtype);
            let entry = Entry::new(name, target.map_or(tensor.dtype(), FloatType::dtype), tensor.shape());
            return Ok(Step::Make(Make::Replace(target), vec![entry]));
        }
        if let Some(layer) = layer {
            let entry = Entry::new(name, self.dtype.dtype(), &layer.state.shape);
            let how = match adapter.peft.module(&layer.prefix) {
                Some(_) => Make::Layer(layer.clone()),
                None => Make::Plain(How::Restore(layer.clone(), self.dtype)),
            };
            return Ok(Step::Make(how, vec![entry]));
        }
        match module(".weight") {
            Some(module) => {
                let entry = Entry::new(name, self.dtype.dtype(), shape);
                Ok(Step::Make(Make::Dense(module.to_owned()), vec![entry]))
            }
            None => step_dense(model, name, Some(self.dtype)),
        }
    }

    fn make(&self, name: &str, how: Make, job: &mut Job<'_, Buffers>) -> Result<()> {
        let Self { base: model, adapter, .. } = *self;
        let at = || adapter.path.display().to_string();
        let peft = &adapter.peft;
        match how {
            Make::Plain(How::Restore(layer, to)) => restore(load(model, &layer)?.weight(), name, to, job),
            Make::Plain(How::Convert(from, to)) => convert(name, from, to, job),
            Make::Layer(layer) => {
                let (linear, shape) = (load(model, &layer)?, layer.state.matrix_shape()?);
                let merged = peft.layer(&layer.prefix, linear).with_context(at)?;
                with_float!(self.dtype, T => {
                    write_rows::<T>(name, shape, job, |rows, out| Ok(merged.merge_rows_into(rows, out)?))
                })
            }
            Make::Dense(module) => {
                let (float, shape) = float_info(model, name)?;
                let [rows, cols] = *shape else { bail!("{}: a weight of shape {shape:?}", job.shard.at(name)) };
                let mut weight = float.values(&job.shard.read(name).with_context(|| job.shard.at(name))?);
                peft.merge_dense(&module, &mut weight, [rows, cols]).with_context(at)?;
                write_floats(name, &weight, self.dtype, job)
            }
            Make::Bias(module) => {
                let trained = peft.replaced().get(name).map(floats).transpose()?;
                let mut bias = match trained {
                    Some(bias) => bias,
                    None => {
                        let (float, _) = float_info(model, name)?;
                        float.values(&job.shard.read(name).with_context(|| job.shard.at(name))?)
                    }
                };
                if let Some(module) = peft.module(&module) {
                    let added = module.lora_bias().unwrap_or_default();
                    ensure!(added.len() == bias.len(), "{}: {} values for a bias of {}", at(), added.len(), bias.len());
                    bias.iter_mut().zip(added).for_each(|(b, a)| *b += module.adapter().scale() * a);
                }
                write_floats(name, &bias, self.dtype, job)
            }
            Make::Replace(target) => {
                let tensor = peft.replaced().get(name).with_context(at)?;
                match target {
                    Some(target) => write_floats(name, &floats(tensor)?, target, job),
                    None => job.writer.write(name, 0, tensor.bytes()),
                }
            }
        }
    }
    fn config(&self, old: &[u8]) -> Result<String> {
        Ok(QuantizationConfig::remove_from(old, self.dtype)?)
    }
}

/// The type and shape of a float tensor.
fn float_info<'m>(model: &'m Model, name: &str) -> Result<(FloatType, &'m [usize])> {
    let (shard, info) = model.find(name).with_context(|| name.to_owned())?;
    let float = FloatType::from_dtype(info.dtype).with_context(|| format!("{}: not a float", shard.at(name)))?;
    Ok((float, &info.shape))
}

fn floats(tensor: &TensorData<'_>) -> Result<Vec<f32>> {
    let float = FloatType::from_dtype(tensor.dtype()).with_context(|| format!("{}: not a float", tensor.dtype()))?;
    Ok(float.values(tensor.bytes()))
}

/// Writes a whole tensor in a type.
fn write_floats(name: &str, values: &[f32], float: FloatType, job: &Job<'_, Buffers>) -> Result<()> {
    let mut bytes = Vec::new();
    float.extend_bytes(values, &mut bytes);
    job.writer.write(name, 0, &bytes)?;
    job.progress.add(bytes.len() as u64);
    Ok(())
}
