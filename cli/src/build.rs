//! A new model beside an old one: for each shard a shard of the same name, the index, `config.json`, the other files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use nf4::checkpoint::Entry;
use serde_json::{Map, Value};

use crate::inputs::Inputs;
use crate::memory;
use crate::model::{CONFIG, INDEX, Model};
use crate::output::{Output, Sealed};
use crate::progress::Progress;
use crate::shard::Shard;
use crate::workers::Workers;
use crate::writer::Writer;

/// Where the new model goes.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// The new model: a directory if the old one is, else a file. It appears when it is complete
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// Replace what is at --out: a file, or a directory that is empty or holds a model (all of it is replaced)
    #[arg(long)]
    pub(crate) force: bool,
}

/// What becomes of a tensor.
#[derive(Debug)]
pub(crate) enum Step<J> {
    /// It is copied bit for bit.
    Copy,
    /// It is left out: it belongs to another one.
    Drop,
    /// Others take its place, and the command makes them.
    Make(J, Vec<Entry>),
}

/// Buffers of a thread.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// Bytes of a file.
    pub(crate) bytes: Vec<u8>,
}

/// What the commands have in hand while they make tensors.
#[derive(Debug)]
pub(crate) struct Job<'a, B> {
    pub(crate) shard: &'a Shard,
    pub(crate) writer: &'a Writer,
    pub(crate) workers: &'a mut Workers<B>,
    pub(crate) progress: &'a Progress,
}

/// What was made.
#[derive(Debug)]
pub(crate) struct Built {
    /// Bytes of all new tensors.
    pub(crate) bytes: u64,
    /// Files and directories of the old model that were not copied.
    pub(crate) left: Vec<String>,
    /// It is complete, but does not have its name yet.
    pub(crate) output: Sealed,
}

/// Bytes that are copied at a time.
const COPY_CHUNK: usize = 1 << 20;

/// About the most memory that a tensor costs, with those that take its place: names, places in the file, the new header.
const PER_TENSOR: usize = 1 << 13;

/// How a command makes a new model.
pub(crate) trait Conversion {
    /// What it has to know to make a tensor.
    type How;

    /// What becomes of a tensor.
    fn step(&self, name: &str) -> Result<Step<Self::How>>;

    /// The tensors of a shard that do not stand in the place of another one.
    fn added(&self, _shard: &Shard) -> Result<Vec<(String, Self::How, Vec<Entry>)>> {
        Ok(Vec::new())
    }

    /// Writes the tensors that [`Self::step`] or [`Self::added`] promised for `name`.
    fn make(&self, name: &str, how: Self::How, job: &mut Job<'_, Buffers>) -> Result<()>;

    /// The new text of `config.json`.
    fn config(&self, old: &[u8]) -> Result<String>;

    /// Files that come with the new model, in place of files of these names in the old one.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// Builds the new model, which is at `target` once the output is committed; `inputs` is all that was read for it.
pub(crate) fn build<C: Conversion>(
    model: &Model,
    target: &Target,
    inputs: &Inputs,
    threads: usize,
    progress: &Progress,
    conversion: &C,
) -> Result<Built> {
    let mut inputs = inputs.clone();
    let (mut others, left) = model.other_files()?;
    if model.directory.is_some() {
        let own = conversion.files();
        others.retain(|old| !own.iter().any(|new| new.file_name() == old.file_name()));
        others.extend(own);
    }
    others.iter().try_for_each(|file| inputs.note(file))?;
    let output = Output::new(&target.out, model.directory.is_some(), target.force, inputs)?;
    let (mut workers, mut bytes, mut weight_map) = (Workers::new(threads), 0, BTreeMap::new());
    for shard in &model.shards {
        let names = shard.names();
        memory::probe(names.len().saturating_mul(PER_TENSOR)).with_context(|| shard.path.display().to_string())?;
        let (mut steps, mut entries) = (Vec::new(), Vec::new());
        for name in names {
            let step = conversion.step(name)?;
            match &step {
                Step::Copy => {
                    let info = shard.header.get(name).with_context(|| shard.at(name))?;
                    entries.push(Entry::new(name, info.dtype, &info.shape));
                }
                Step::Drop => {}
                Step::Make(_, made) => entries.extend(made.iter().cloned()),
            }
            steps.push((name.to_owned(), step));
        }
        for (name, how, made) in conversion.added(shard)? {
            entries.extend(made.iter().cloned());
            steps.push((name, Step::Make(how, made)));
        }
        weight_map.extend(entries.iter().map(|e| (e.name.clone(), Value::from(shard.name()))));
        let metadata = shard.header.metadata().clone();
        let file = output.create(shard.name())?;
        let writer = Writer::new(file, &output.path(shard.name()), entries, metadata)?;
        let mut job = Job { shard, writer: &writer, workers: &mut workers, progress };
        for (name, step) in steps {
            progress.at(&name);
            match step {
                Step::Copy => copy(&name, &mut job)?,
                Step::Drop => {}
                Step::Make(how, _) => conversion.make(&name, how, &mut job)?,
            }
        }
        bytes += writer.finish()?;
    }
    if let Some(directory) = &model.directory {
        if let Some(index) = &model.index {
            let text = serde_json::to_string_pretty(&new_index(index, weight_map, bytes))? + "\n";
            write(&output, INDEX, &text)?;
        }
        if let Some(old) = &model.config {
            let text = conversion.config(old).with_context(|| directory.join(CONFIG).display().to_string())?;
            write(&output, CONFIG, &text)?;
        }
        for path in others {
            let name = path.file_name().unwrap_or_default();
            let (mut from, mut to) = (Inputs::default().open(&path)?, output.create(name)?);
            let copied = std::io::copy(&mut from, &mut to);
            copied.with_context(|| format!("{} to {}", path.display(), output.path(name).display()))?;
        }
    }
    Ok(Built { bytes, left, output: output.seal()? })
}

/// Copies a tensor.
fn copy(name: &str, job: &mut Job<'_, Buffers>) -> Result<()> {
    let Job { shard, writer, progress, .. } = *job;
    let range = shard.header.file_range(name).unwrap_or_default();
    let length = usize::try_from(range.end - range.start)?;
    job.workers.run(length, COPY_CHUNK, |buffers, part| {
        memory::resize(&mut buffers.bytes, part.len(), 0)?;
        shard.read_part(name, part.start as u64, &mut buffers.bytes)?;
        writer.write(name, part.start as u64, &buffers.bytes)?;
        progress.add(part.len() as u64);
        Ok(())
    })
}

/// The old index with the new tensors; `metadata` keeps its other entries.
fn new_index(old: &Map<String, Value>, weight_map: BTreeMap<String, Value>, bytes: u64) -> Map<String, Value> {
    let mut index = old.clone();
    let metadata = index.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(metadata) = metadata {
        metadata.insert("total_size".to_owned(), bytes.into());
    }
    index.insert("weight_map".to_owned(), Value::Object(weight_map.into_iter().collect()));
    index
}

fn write(output: &Output, name: &str, text: &str) -> Result<()> {
    output.create(name)?.write_all(text.as_bytes()).with_context(|| output.path(name).display().to_string())
}
