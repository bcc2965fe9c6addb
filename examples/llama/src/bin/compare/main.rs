//! Compares a model with reference logits, greedy tokens and perplexities; see `reference.py`, which makes them.

#![allow(clippy::std_instead_of_alloc, reason = "a program, which has std")]

mod agreement;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nf4::Arithmetic;
use nf4::checkpoint::{TensorFile, TensorSource};
use nf4_llama::{
    AdapterId, Cache, CacheType, Directory, Logits, Model, Options, Part, Text, TextFiles, Workspace, argmax,
    read_adapter,
};
use serde_json::Value;

use crate::agreement::{Agreement, Truth};

/// Compares the logits of a model with those of a reference.
///
/// Teacher-forced logits must be within a bound; greedy tokens must be equal except where the two largest logits of the
/// reference are nearer than twice that; perplexities must agree to 0.1 %.
#[derive(Debug, Parser)]
struct Arguments {
    /// The directory of the model
    model: PathBuf,
    /// The directory with manifest.json and the reference values
    reference: PathBuf,
    /// The case in the manifest
    #[arg(long, default_value = "nf4")]
    case: String,
    /// The case of the same model with the adapter in DIR; several times, to switch between them
    #[arg(long = "adapter", value_name = "CASE=DIR", value_parser = case_and_folder)]
    adapters: Vec<(String, PathBuf)>,
    /// Skip the texts
    #[arg(long)]
    no_perplexity: bool,
}

/// What is allowed of an arithmetic.
struct Bounds {
    arithmetic: Arithmetic,
    /// The most that a teacher-forced logit may be off, where logits have an rms of about 8.
    logit: f64,
    /// By how much a perplexity may differ from the reference, as a part of it. Without one, by three standard deviations of
    /// what `divergence` leaves to chance: the difference of two near log-likelihoods has twice their divergence as its
    /// variance, per token.
    perplexity: Option<f64>,
    /// The mean divergence of the next token's distribution from the exact one, in nats.
    divergence: f64,
}

/// The f32 of bitsandbytes is off by up to 1.3e-4; 16x4 rounds activations to 14 bits, 210 times in a row. 8x8 rounds them to
/// 8 bits, and weights too: single logits say little then.
const BOUNDS: [Bounds; 3] = [
    Bounds { arithmetic: Arithmetic::F32, logit: 5e-4, perplexity: Some(1e-3), divergence: 1e-6 },
    Bounds { arithmetic: Arithmetic::SixteenByFour, logit: 0.1, perplexity: Some(1e-3), divergence: 1e-4 },
    Bounds { arithmetic: Arithmetic::EightByEight, logit: f64::INFINITY, perplexity: None, divergence: 1e-2 },
];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let manifest = fs::read(arguments.reference.join("manifest.json")).context("manifest.json")?;
    let manifest: Value = serde_json::from_slice(&manifest).context("manifest.json")?;
    let directory = Directory::open(&arguments.model)?;
    let load = |arithmetic| -> Result<Model> {
        let options = Options { arithmetic, threads: Some(Arc::new(nf4::Rayon)), ..Options::default() };
        Ok(Model::load(directory.config()?, &directory, options, |_, _| {})?)
    };
    let f32 = load(Arithmetic::F32)?;
    for bounds in &BOUNDS {
        let mut model = load(bounds.arithmetic)?;
        let reference = Reference { folder: &arguments.reference, manifest: &manifest, bounds };
        reference.compare(&model, &arguments.case, None)?;
        let mut adapters = Vec::new();
        for (case, path) in &arguments.adapters {
            adapters.push((case, model.add_adapter(case, &read_adapter(path)?)?));
        }
        // Switched on one after the other, off, and on again.
        for _ in 0..2 {
            for (case, id) in &adapters {
                reference.compare(&model, case, Some(*id))?;
            }
            if !adapters.is_empty() {
                reference.compare(&model, &arguments.case, None)?;
            }
        }
        if !arguments.no_perplexity {
            reference.perplexities(&model, &f32, &directory, &arguments.case)?;
        }
    }
    println!("all within the bounds");
    Ok(())
}

struct Reference<'a> {
    folder: &'a Path,
    manifest: &'a Value,
    bounds: &'a Bounds,
}

impl Reference<'_> {
    /// Logits and greedy tokens of every prompt of a case.
    fn compare(&self, model: &Model, case: &str, adapter: Option<AdapterId>) -> Result<()> {
        let file = self.folder.join(self.manifest["cases"][case]["file"].as_str().context("the case has no file")?);
        let bytes = fs::read(&file).with_context(|| file.display().to_string())?;
        let tensors = TensorFile::parse(&bytes).with_context(|| file.display().to_string())?;
        let prompts: BTreeMap<String, Value> = serde_json::from_value(self.manifest["prompts"].clone())?;
        for (name, prompt) in &prompts {
            let ids: Vec<u32> = serde_json::from_value(prompt["ids"].clone())?;
            let at = format!("{case}, {name}");
            self.compare_prompt(model, &tensors, (name, &at), &ids, adapter).context(at.clone())?;
        }
        Ok(())
    }

    fn compare_prompt(
        &self,
        model: &Model,
        tensors: &TensorFile<'_>,
        (name, at): (&str, &str),
        ids: &[u32],
        adapter: Option<AdapterId>,
    ) -> Result<()> {
        let exact = floats(tensors, &format!("{name}.exact.top.values"))?;
        let places = words(tensors, &format!("{name}.logits.top.ids"))?;
        let (greedy, top2) =
            (words(tensors, &format!("{name}.greedy.ids"))?, floats(tensors, &format!("{name}.exact.greedy.top2"))?);
        let vocabulary = model.config().vocabulary;
        let mut workspace = Workspace::new(model, ids.len(), ids.len())?;
        let mut cache = Cache::new(model.config(), ids.len() + greedy.len(), CacheType::F32)?;
        let logits =
            model.forward(&mut [Part { cache: &mut cache, tokens: ids, adapter }], Logits::All, &mut workspace)?;

        let count = exact.len() / ids.len();
        let (mut most, mut squares) = (0.0_f64, 0.0);
        for (position, logits) in logits.chunks_exact(vocabulary).enumerate() {
            let at = position * count..(position + 1) * count;
            for (exact, place) in exact[at.clone()].iter().zip(&places[at]) {
                let error = (f64::from(logits[*place as usize]) - f64::from(*exact)).abs();
                (most, squares) = (most.max(error), squares + error * error);
            }
        }
        let rms = (squares / exact.len() as f64).sqrt();
        let bound = self.bounds.logit;
        ensure!(most <= bound, "a logit is off by {most}, more than {bound}");

        // Greedy: the next token of each step must be that of the reference, which then is the input.
        let mut next = argmax(&logits[(ids.len() - 1) * vocabulary..]);
        let mut near = 0;
        for (step, (token, top2)) in greedy.iter().zip(top2.chunks_exact(2)).enumerate() {
            let margin = f64::from(top2[0] - top2[1]);
            if next != *token {
                ensure!(margin <= 2.0 * bound, "step {step}: token {next}, not {token}, by a margin of {margin}");
                near += 1;
            }
            next = argmax(model.extend(&mut cache, &[*token], adapter, &mut workspace)?);
        }
        println!(
            "{} {at}: logits off by at most {most:.2e}, rms {rms:.2e}; {} of {} greedy tokens equal",
            self.bounds.arithmetic.name(),
            greedy.len() - near,
            greedy.len(),
        );
        Ok(())
    }

    /// The perplexity of each text, in one window, and how far the distributions are from those of the reference; if it does
    /// not have its logits, from those of `f32`, which is `model` in that arithmetic.
    fn perplexities(&self, model: &Model, f32: &Model, directory: &Directory, case: &str) -> Result<()> {
        let tokenizer = directory.read("tokenizer.json")?.context("no tokenizer.json")?;
        let text = Text::new(TextFiles { tokenizer: &tokenizer, ..TextFiles::default() }, &[])?;
        let texts: BTreeMap<String, Value> = serde_json::from_value(self.manifest["perplexity"].clone())?;
        let name = if case == "nf4_dq" { "NF4 double quant, f32 compute" } else { "NF4, f32 compute" };
        for (label, entry) in &texts {
            let file = self.folder.join(entry["file"].as_str().context("the text has no file")?);
            let content = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let mut ids = text.encode(&content, false)?;
            ids.truncate(usize::try_from(entry["tokens"].as_u64().context("the text has no tokens")?)?);
            let logits = match entry["logits"][case].as_str() {
                Some(file) => Some(fs::read(self.folder.join(file)).with_context(|| file.to_owned())?),
                None => None,
            };
            let truth = match &logits {
                Some(bytes) => Truth::Logits(floats(&TensorFile::parse(bytes)?, "logits")?),
                None => Truth::model(f32, ids.len())?,
            };
            let Agreement { perplexity: got, divergence, same_top } = Agreement::measure(model, truth, &ids)?;
            let expected = entry["results"][name]["perplexity"].as_f64().with_context(|| format!("{label}: {name}"))?;
            let off = got / expected - 1.0;
            println!(
                "{} {label}: perplexity {got:.4}, reference {expected:.4}, {:+.4} %; \
                 against {}: KL {divergence:.3e}, same top token {:.2} %",
                self.bounds.arithmetic.name(),
                off * 100.0,
                if logits.is_some() { "f64" } else { "f32" },
                same_top * 100.0
            );
            let Bounds { perplexity, divergence: most, .. } = *self.bounds;
            let perplexity = perplexity.unwrap_or_else(|| 3.0 * (2.0 * most / ids.len() as f64).sqrt());
            ensure!(off.abs() <= perplexity, "{label}: the perplexity is off by more than {} %", perplexity * 100.0);
            ensure!(divergence <= most, "{label}: a divergence of more than {most}");
        }
        Ok(())
    }
}

fn floats(tensors: &TensorFile<'_>, name: &str) -> Result<Vec<f32>> {
    Ok(tensors.read(name)?.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn words(tensors: &TensorFile<'_>, name: &str) -> Result<Vec<u32>> {
    Ok(tensors.read(name)?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
}

fn case_and_folder(text: &str) -> Result<(String, PathBuf), String> {
    let (case, path) = text.split_once('=').ok_or_else(|| format!("{text:?} is not CASE=DIR"))?;
    Ok((case.to_owned(), path.into()))
}
