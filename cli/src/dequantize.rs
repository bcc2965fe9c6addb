//! `nf4 dequantize`: the 4-bit layers of a model become plain weights again.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use nf4::Quantized4Bit;
use nf4::checkpoint::{FloatType, QuantizationConfig, TensorSource};
use serde_json::json;

use crate::Global;
use crate::build::{Buffers, Conversion, Job, Step, Target, build};
use crate::floats::with_float;
use crate::layers::{Layer, Layers, load};
use crate::model::Model;
use crate::progress::Progress;
use crate::quantize::{float_type, left};
use crate::report::Prepared;
use crate::rows::{convert, write_rows};
use crate::text::{Text, bytes};
use crate::writer::Entry;

/// Restore the 4-bit layers of a model to plain weights.
///
/// Each weight is codebook times scale, rounded once: the values that bitsandbytes restores. With --dtype all other
/// float tensors are converted to that type too; without it they, like all others, are copied bit for bit, and
/// `config.json` loses its `quantization_config`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nf4 dequantize Llama-3.2-1B-nf4 --out Llama-3.2-1B-restored --dtype bf16")]
pub(crate) struct Dequantize {
    /// A model directory or a safetensors file
    model: PathBuf,
    #[command(flatten)]
    target: Target,
    /// The type of all float tensors: f32, f16 or bf16 [default: each layer gets the type that it had before it was
    /// quantized, and other tensors keep theirs]
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    dtype: Option<FloatType>,
}

impl Dequantize {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let start = Instant::now();
        let model = Model::open(&self.model)?;
        let layers = Layers::read_all(&model)?;
        let Some(first) = layers.by_weight.values().next() else {
            bail!("{}: no 4-bit layers in {} tensors", model.path.display(), model.names().count());
        };
        let main_type = self.dtype.unwrap_or(first.state.dtype);
        let progress = Progress::new("dequantize", restored_bytes(&model, &layers, self.dtype), global.quiet);
        let conversion = Restore { model: &model, layers: &layers, dtype: self.dtype, main_type };
        let built = build(&model, &self.target, &model.inputs, global.threads, &progress, &conversion)?;
        drop(progress);
        let seconds = start.elapsed().as_secs_f64();
        let mut text = Text::default();
        text.line(format_args!(
            "{}: {} layers restored, {} -> {}, {seconds:.2} s",
            self.target.out.display(),
            layers.by_weight.len(),
            bytes(model.data_len()),
            bytes(built.bytes),
        ));
        left(&built.left, &mut text);
        let json = json!({
            "output": self.target.out.to_string_lossy(),
            "dequantized": layers.by_weight.values().map(|l| &l.prefix).collect::<Vec<_>>(),
            "dtype": main_type.torch_name(),
            "bytes_before": model.data_len(),
            "bytes_after": built.bytes,
            "not_copied": built.left,
            "seconds": seconds,
        });
        Ok(Prepared::output(built.output, text, json))
    }
}

/// How a tensor of the restored model is made.
pub(crate) enum How {
    /// From a 4-bit layer.
    Restore(Layer, FloatType),
    /// From a float tensor of another type.
    Convert(FloatType, FloatType),
}

/// What becomes of a tensor that no 4-bit layer has: floats are converted to the type, if one is given.
pub(crate) fn step_dense<H: From<How>>(model: &Model, name: &str, to: Option<FloatType>) -> Result<Step<H>> {
    let info = model.info(name).with_context(|| name.to_owned())?;
    Ok(match (FloatType::from_dtype(info.dtype), to) {
        (Some(from), Some(to)) if from != to => {
            Step::Make(How::Convert(from, to).into(), vec![Entry::new(name, to.dtype(), &info.shape)])
        }
        _ => Step::Copy,
    })
}

/// Writes the weights of a layer in a type.
pub(crate) fn restore(weight: &Quantized4Bit, name: &str, float: FloatType, job: &mut Job<'_, Buffers>) -> Result<()> {
    let shape = [weight.rows(), weight.cols()];
    with_float!(float, T => write_rows::<T>(name, shape, job, |rows, out| Ok(weight.dequantize_rows(rows, out)?)))
}

struct Restore<'a> {
    model: &'a Model,
    layers: &'a Layers,
    /// `None`: each layer's own.
    dtype: Option<FloatType>,
    /// What `config.json` says.
    main_type: FloatType,
}

impl Conversion for Restore<'_> {
    type How = How;

    fn step(&self, name: &str) -> Result<Step<Self::How>> {
        if self.layers.companions.contains(name) {
            return Ok(Step::Drop);
        }
        let Some(layer) = self.layers.by_weight.get(name) else { return step_dense(self.model, name, self.dtype) };
        let float = self.dtype.unwrap_or(layer.state.dtype);
        let entry = Entry::new(name, float.dtype(), &layer.state.shape);
        Ok(Step::Make(How::Restore(layer.clone(), float), vec![entry]))
    }

    fn make(&self, name: &str, how: How, job: &mut Job<'_, Buffers>) -> Result<()> {
        match how {
            How::Restore(layer, float) => restore(load(self.model, &layer)?.weight(), name, float, job),
            How::Convert(from, to) => convert(name, from, to, job),
        }
    }

    fn config(&self, old: &[u8]) -> Result<String> {
        Ok(QuantizationConfig::remove_from(old, self.main_type)?)
    }
}

/// Bytes of the new model.
pub(crate) fn restored_bytes(model: &Model, layers: &Layers, float: Option<FloatType>) -> u64 {
    let size = |name: &str| -> usize {
        let Some(info) = model.info(name).filter(|_| !layers.companions.contains(name)) else { return 0 };
        let bytes = info.data_offsets.1 - info.data_offsets.0;
        match (layers.by_weight.get(name), FloatType::from_dtype(info.dtype), float) {
            (Some(layer), ..) => {
                let weights = layer.state.shape.iter().fold(1_usize, |n, dim| n.saturating_mul(*dim));
                weights.saturating_mul(float.unwrap_or(layer.state.dtype).size())
            }
            (None, Some(from), Some(to)) => bytes / from.size() * to.size(),
            _ => bytes,
        }
    };
    model.names().map(|name| size(name) as u64).sum()
}
