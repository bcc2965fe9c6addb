//! `nf4 dequantize`: the 4-bit weights of a model become plain ones again.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use nf4::checkpoint::{TensorSource, packed_tensors};
use serde_json::json;

use crate::Global;
use crate::build::{Target, build};
use crate::model::Model;
use crate::planned::{Planned, Types, notes};
use crate::progress::Progress;
use crate::quantize::left;
use crate::report::Prepared;
use crate::text::{Text, bytes};

/// Dequantize the 4-bit weights of a model: the result is a plain model.
///
/// Each weight is its codebook value times its scale, rounded once: the value that bitsandbytes computes, in the layout
/// that the model has without quantization. Other tensors are copied bit for bit, or converted with --dtype, and
/// `config.json` loses its `quantization_config`. It is a merge without an adapter.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nf4 dequantize Llama-3.2-1B-nf4 --out Llama-3.2-1B-plain --dtype bf16")]
pub(crate) struct Dequantize {
    /// A model directory or a safetensors file
    model: PathBuf,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    types: Types,
}

impl Dequantize {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let start = Instant::now();
        let model = Model::open(&self.model)?;
        let plan = self.types.plan(&model, None)?;
        if plan.dequantized() == 0 {
            bail!("{}: no 4-bit layers in {} tensors", model.path.display(), model.names().count());
        }
        let planned = Planned::new(&model, &plan, Vec::new());
        let progress = Progress::new("dequantize", planned.bytes(), global.quiet);
        let built = build(&model, &self.target, &model.inputs, global.threads, &progress, &planned)?;
        drop(progress);
        let seconds = start.elapsed().as_secs_f64();
        let mut text = Text::default();
        text.line(format_args!(
            "{}: {} tensors dequantized, {} -> {}, {seconds:.2} s",
            self.target.out.display(),
            plan.dequantized(),
            bytes(model.data_len()),
            bytes(built.bytes),
        ));
        let notes = notes(&plan, &mut text);
        left(&built.left, &mut text);
        let module = |tensor: String| tensor.strip_suffix(".weight").map_or_else(|| tensor.clone(), str::to_owned);
        let json = json!({
            "output": self.target.out.to_string_lossy(),
            "dequantized": packed_tensors(&model).into_iter().map(module).collect::<Vec<_>>(),
            "notes": notes,
            "dtype": plan.dtype().torch_name(),
            "bytes_before": model.data_len(),
            "bytes_after": built.bytes,
            "not_copied": built.left,
            "seconds": seconds,
        });
        Ok(Prepared::output(built.output, text, json))
    }
}
