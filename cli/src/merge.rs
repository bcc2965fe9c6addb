//! `nf4 merge`: a base model and an adapter become one model of plain weights.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::Global;
use crate::adapters::Adapter;
use crate::build::{Target, build};
use crate::model::Model;
use crate::planned::{Planned, Types, notes};
use crate::progress::Progress;
use crate::quantize::left;
use crate::report::Prepared;
use crate::text::{Text, bytes};

/// Merge a PEFT adapter into its base model: the result needs neither PEFT nor bitsandbytes.
///
/// Each merged weight is `dequantize(base) + scale * B A` (with DoRA, times magnitude over norm), rounded to f32 and then
/// to its type. Nothing is quantized again: 4-bit weights without an adapter are dequantized. A base that is not quantized
/// is merged in the same way. Tensors that the adapter trained as a whole replace those of the base, or are added. An output
/// head that shares the weight of the embedding gets a weight of its own if the adapter changes only one of them. The
/// tokenizer, chat template and generation settings of the adapter replace those of the base. The report lists what was
/// added, untied, renamed or resized. It is an error if the base does not have a module of the adapter, or if the adapter
/// changes weights that are packed in another format than the 4 bits of bitsandbytes.
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
    #[command(flatten)]
    types: Types,
}

impl Merge {
    pub(crate) fn run(&self, global: &Global) -> Result<Prepared> {
        let start = Instant::now();
        let model = Model::open(&self.base)?;
        let adapter = Adapter::open(&self.adapter)?;
        let plan = self.types.plan(&model, Some(&adapter.peft)).with_context(|| adapter.path.display().to_string())?;
        let files = adapter.model_files()?;
        let mut inputs = model.inputs.clone();
        inputs.extend(&adapter.inputs);
        files.iter().try_for_each(|file| inputs.note(file))?;
        let names: Vec<String> =
            files.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into())).collect();
        let planned = Planned::new(&model, &plan, files);
        let progress = Progress::new("merge", planned.bytes(), global.quiet);
        let built = build(&model, &self.target, &inputs, global.threads, &progress, &planned)?;
        drop(progress);
        let seconds = start.elapsed().as_secs_f64();
        let replaced: Vec<&String> = adapter.peft.replaced().keys().collect();
        let mut text = Text::default();
        text.line(format_args!(
            "{}: {} modules merged, {} tensors replaced, {} -> {}, {seconds:.2} s",
            self.target.out.display(),
            plan.merged().len(),
            replaced.len(),
            bytes(model.data_len()),
            bytes(built.bytes),
        ));
        let notes = notes(&plan, &mut text);
        if model.directory.is_some() && !names.is_empty() {
            text.line(format_args!("from the adapter: {}", names.join(", ")));
        }
        left(&built.left, &mut text);
        let json = json!({
            "output": self.target.out.to_string_lossy(),
            "merged": plan.merged(),
            "replaced": replaced,
            "notes": notes,
            "files_of_adapter": names,
            "dtype": plan.dtype().torch_name(),
            "bytes_before": model.data_len(),
            "bytes_after": built.bytes,
            "not_copied": built.left,
            "seconds": seconds,
        });
        Ok(Prepared::output(built.output, text, json))
    }
}
