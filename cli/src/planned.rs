//! Writes the tensors of a merged or dequantized model as the library plans and computes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use nf4::checkpoint::{Entry, FloatType, MergeOptions, MergedModel, PeftAdapter, TensorSource};
use serde_json::{Value, json};

use crate::build::{Buffers, Conversion, Job, Step};
use crate::model::Model;
use crate::quantize::float_type;
use crate::shard::Shard;
use crate::text::Text;

/// Bytes that a thread computes at a time.
const CHUNK: usize = 1 << 19;

/// The types of the new model.
#[derive(Debug, Args)]
pub(crate) struct Types {
    /// The type of all floats: f32, f16, bf16, or `keep`, with which each tensor has the type that it has in the base, and
    /// dequantized weights have the type from before they were quantized. Parameters that are f32 on purpose stay f32
    #[arg(long, value_name = "TYPE", default_value = "keep", value_parser = output_type)]
    dtype: OutputType,
    /// Let values that are too large for the type become infinite; without this they are an error
    #[arg(long)]
    allow_overflow: bool,
}

/// A type, or none: tensors keep theirs.
#[derive(Debug, Clone, Copy)]
struct OutputType(Option<FloatType>);

fn output_type(text: &str) -> Result<OutputType, String> {
    let found = if text == "keep" { Ok(None) } else { float_type(text).map(Some) };
    found.map(OutputType).map_err(|_| "expected f32, f16, bf16 or keep".to_owned())
}

impl Types {
    /// The plan of a model with these types.
    pub(crate) fn plan<'a>(&self, model: &'a Model, adapter: Option<&'a PeftAdapter>) -> Result<MergedModel<'a>> {
        let mut options = MergeOptions::new();
        if let OutputType(Some(dtype)) = self.dtype {
            options = options.with_dtype(dtype);
        }
        if let Some(config) = &model.config {
            options = options.with_config(config);
        }
        if self.allow_overflow {
            options = options.with_overflow();
        }
        MergedModel::new(model, adapter, &options).with_context(|| model.path.display().to_string())
    }
}

/// A plan on its way to files.
pub(crate) struct Planned<'a> {
    merged: &'a MergedModel<'a>,
    at: String,
    /// Tensors that the old model does not have, by the shard that they go to.
    added: BTreeMap<&'a str, Vec<&'a str>>,
    files: Vec<PathBuf>,
}

impl<'a> Planned<'a> {
    /// `files` come with the new model.
    pub(crate) fn new(model: &'a Model, merged: &'a MergedModel<'a>, files: Vec<PathBuf>) -> Self {
        let last = model.shards.last().map_or("", Shard::name);
        let mut added: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for name in merged.names().filter(|name| model.find(name).is_none()) {
            let home = merged.home(name).and_then(|home| model.find(home));
            added.entry(home.map_or(last, |(shard, _)| shard.name())).or_default().push(name);
        }
        Self { merged, at: model.path.display().to_string(), added, files }
    }

    /// Bytes of the new model.
    pub(crate) fn bytes(&self) -> u64 {
        self.merged.names().filter_map(|name| self.merged.info(name)).map(|info| info.data_offsets.1 as u64).sum()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.merged.info(name).map(|info| Entry::new(name, info.dtype, &info.shape))
    }
}

impl Conversion for Planned<'_> {
    type How = ();

    fn step(&self, name: &str) -> Result<Step<()>> {
        Ok(self.entry(name).map_or(Step::Drop, |entry| Step::Make((), vec![entry])))
    }

    fn added(&self, shard: &Shard) -> Result<Vec<(String, (), Vec<Entry>)>> {
        let names = self.added.get(shard.name()).into_iter().flatten();
        Ok(names.filter_map(|name| Some(((*name).to_owned(), (), vec![self.entry(name)?]))).collect())
    }

    fn make(&self, name: &str, (): (), job: &mut Job<'_, Buffers>) -> Result<()> {
        let Job { writer, progress, .. } = *job;
        let reader = self.merged.open(name).with_context(|| self.at.clone())?;
        let chunk = (CHUNK / reader.unit_bytes().max(1)).max(1);
        job.workers.run(reader.units(), chunk, |buffers, part| {
            buffers.bytes.clear();
            let offset = (part.start * reader.unit_bytes()) as u64;
            reader.read(part, &mut buffers.bytes).with_context(|| self.at.clone())?;
            writer.write(name, offset, &buffers.bytes)?;
            progress.add(buffers.bytes.len() as u64);
            Ok(())
        })
    }

    fn config(&self, _old: &[u8]) -> Result<String> {
        self.merged.config()?.context("the plan was made without config.json")
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }
}

/// Says what is otherwise than in the old model, one line for each, and returns it for machines.
pub(crate) fn notes(merged: &MergedModel<'_>, text: &mut Text) -> Value {
    let notes: Vec<String> = merged.notes().iter().map(ToString::to_string).collect();
    for note in &notes {
        text.line(note);
    }
    json!(notes)
}
