//! A PEFT adapter on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nf4::LoRAScaling;
use nf4::checkpoint::{PeftAdapter, TensorSource};
use serde_json::json;

use crate::model::{Model, read_small};
use crate::report::{Report, bytes, shape, table};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter, in memory, and where it is from.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) path: PathBuf,
    pub(crate) peft: PeftAdapter,
    file: Model,
}

impl Adapter {
    /// Whether there is an adapter in this directory.
    pub(crate) fn is_at(path: &Path) -> bool {
        path.join(CONFIG).exists()
    }

    /// Reads all of it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let weights = path.join(WEIGHTS);
        ensure!(path.is_dir(), "{}: not a directory with a PEFT adapter", path.display());
        let config = read_small(&path.join(CONFIG))?;
        let file = Model::open(&weights)?;
        let peft = PeftAdapter::load(&config, &file).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), peft, file })
    }

    /// The files that it was read from.
    pub(crate) fn files(&self) -> [PathBuf; 2] {
        [CONFIG, WEIGHTS].map(|name| self.path.join(name))
    }

    /// What it holds.
    pub(crate) fn inspect(&self) -> Result<Report> {
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
        let mut text = table(&rows);
        let replaced: Vec<&String> = self.peft.replaced().keys().collect();
        for name in &replaced {
            text += &format!("{name} is replaced as a whole\n");
        }
        let tensors = self.file.names().count();
        text += &format!("\nPEFT adapter: {} modules, {tensors} tensors, {}", list.len(), bytes(self.file.data_len()));
        text += &variants.iter().map(|v| format!(", {v}")).collect::<String>();
        text.push('\n');
        let json = json!({
            "path": self.path.to_string_lossy(),
            "modules": list,
            "replaced": replaced,
            "rslora": rslora,
            "dora": config.is_dora(),
            "lora_bias": config.lora_bias(),
            "totals": { "modules": list.len(), "tensors": tensors, "bytes": self.file.data_len() },
        });
        Ok(Report::good(text, json))
    }
}
