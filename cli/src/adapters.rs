//! A PEFT adapter on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nf4::LoRAScaling;
use nf4::checkpoint::{PeftAdapter, TensorSource};
use serde_json::json;

use crate::hub;
use crate::inputs::Inputs;
use crate::model::{MAX_CONFIG, Model, is_there, read_small};
use crate::report::Prepared;
use crate::text::{Text, bytes, shape};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The subdirectories with adapters: PEFT puts those with names of their own there, trainers those of each checkpoint.
fn within(path: &Path) -> Result<Vec<String>> {
    let at = || path.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(at)? {
        let entry = entry.with_context(at)?;
        if is_there(&entry.path().join(CONFIG)).unwrap_or(false) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// An adapter, in memory, and where it is from.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) path: PathBuf,
    pub(crate) peft: PeftAdapter,
    file: Model,
    /// All that was read.
    pub(crate) inputs: Inputs,
}

impl Adapter {
    /// Whether there is an adapter in this directory.
    pub(crate) fn is_at(path: &Path) -> Result<bool> {
        let path = &*hub::resolve(path)?;
        Ok(path.is_dir() && is_there(&path.join(CONFIG))?)
    }

    /// Reads all of it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let path = &*hub::resolve(path)?;
        let weights = path.join(WEIGHTS);
        ensure!(path.is_dir(), "{}: not a directory with a PEFT adapter", path.display());
        let pickle = path.join("adapter_model.bin");
        ensure!(is_there(&weights)? || !is_there(&pickle)?, "{}: {}", pickle.display(), hub::PICKLE);
        if !is_there(&path.join(CONFIG))? {
            let others = within(path)?;
            let hint =
                if others.is_empty() { String::new() } else { format!("; there is one in {}", others.join(", ")) };
            bail!("{}: no {CONFIG}{hint}", path.display());
        }
        let mut inputs = Inputs::default();
        inputs.note(path)?;
        let config = read_small(&path.join(CONFIG), MAX_CONFIG, &mut inputs)?;
        let file = Model::open(&weights)?;
        let peft = PeftAdapter::load(&config, &file).with_context(|| path.display().to_string())?;
        inputs.extend(&file.inputs);
        Ok(Self { path: path.to_owned(), peft, file, inputs })
    }

    /// Files that a model with this adapter has from it and not from the base: tokens may have been added, and the
    /// template is the one that it was trained with.
    pub(crate) fn model_files(&self) -> Result<Vec<PathBuf>> {
        const FILES: [&str; 16] = [
            "added_tokens.json",
            "chat_template.jinja",
            "chat_template.json",
            "generation_config.json",
            "merges.txt",
            "preprocessor_config.json",
            "processor_config.json",
            "sentencepiece.bpe.model",
            "special_tokens_map.json",
            "spiece.model",
            "spm.model",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
            "vocab.txt",
        ];
        let mut files = Vec::new();
        for path in FILES.map(|name| self.path.join(name)) {
            if is_there(&path)? && path.is_file() {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// What it holds.
    pub(crate) fn inspect(&self) -> Result<Prepared> {
        let (mut rows, mut list) =
            (vec![["module", "shape", "rank", "alpha", "scale"].map(str::to_owned).to_vec()], Vec::new());
        for (name, module) in self.peft.modules() {
            let a = module.adapter();
            let dims = [a.d_out(), a.d_in()];
            let numbers = [a.rank().to_string(), a.alpha().to_string(), a.scale().to_string()];
            rows.push([name.to_owned(), shape(&dims)].into_iter().chain(numbers).collect());
            list.push(json!({
                "name": name,
                "shape": dims,
                "rank": a.rank(),
                "alpha": a.alpha(),
                "scale": a.scale(),
            }));
        }
        let config = self.peft.config();
        let rslora = config.scaling() == LoRAScaling::RsLoRA;
        let variants: Vec<&str> = [("rsLoRA", rslora), ("DoRA", config.is_dora()), ("lora_bias", config.lora_bias())]
            .into_iter()
            .filter_map(|(name, on)| on.then_some(name))
            .collect();
        let mut text = Text::default();
        text.table(&rows);
        let replaced: Vec<&String> = self.peft.replaced().keys().collect();
        for name in &replaced {
            text.line(format_args!("{name} is replaced as a whole"));
        }
        for (name, count) in self.peft.parameters() {
            text.line(format_args!("{name}: {count} parameters with adapters of their own"));
        }
        for (name, tokens) in self.peft.tokens() {
            text.line(format_args!("{name}: {} tokens", tokens.indices().len()));
        }
        let tensors = self.file.names().count();
        let variants: String = variants.iter().map(|v| format!(", {v}")).collect();
        let size = bytes(self.file.data_len());
        text.line("").line(format_args!("PEFT adapter: {} modules, {tensors} tensors, {size}{variants}", list.len()));
        let parameters = self.peft.parameters().map(|(name, count)| json!({"name": name, "count": count}));
        let tokens = self.peft.tokens().iter().map(|(name, t)| json!({"name": name, "indices": t.indices()}));
        let json = json!({
            "path": self.path.to_string_lossy(),
            "modules": list,
            "replaced": replaced,
            "parameters": parameters.collect::<Vec<_>>(),
            "tokens": tokens.collect::<Vec<_>>(),
            "rslora": rslora,
            "dora": config.is_dora(),
            "lora_bias": config.lora_bias(),
            "totals": { "modules": list.len(), "tensors": tensors, "bytes": self.file.data_len() },
        });
        Ok(Prepared::report(text, json, true))
    }
}
