//! What a training that was stopped goes on from: one file, which is replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nf4::checkpoint::{Dtype, TensorData, TensorFile, TensorMap, TensorSource, to_safetensors};
use serde::{Deserialize, Serialize};

use crate::optimizer::State;
use crate::settings::Settings;

/// The name of the file in the directory of a run.
pub(crate) const FILE: &str = "checkpoint.safetensors";

/// The losses of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Of each step: the mean over its targets.
    pub training: Vec<f64>,
    /// Evaluations: after how many steps, and the mean over all targets.
    pub evaluation: Vec<(usize, f64)>,
}

/// All that decides how a run goes on.
pub struct Checkpoint {
    pub(crate) settings: Settings,
    pub(crate) history: History,
    pub(crate) state: State,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("history", &self.history).finish_non_exhaustive()
    }
}

/// What is not a tensor.
#[derive(Serialize, Deserialize)]
struct Text {
    settings: Settings,
    history: History,
    step: u32,
}

const TEXT: &str = "run";
const PARTS: [&str; 3] = ["value", "first_moment", "second_moment"];

impl Checkpoint {
    /// Writes the file into a directory. The new one is written beside the old one, synced, and put in its place, so a
    /// whole one is there at any time.
    pub(crate) fn save(&self, directory: &Path) -> Result<()> {
        let mut tensors = TensorMap::new();
        for (name, parts) in &self.state.tensors {
            for (part, values) in PARTS.iter().zip(parts) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let tensor = TensorData::new(name, Dtype::F32, vec![values.len()], bytes)?;
                tensors.insert(format!("{name}.{part}"), tensor);
            }
        }
        let text = Text { settings: self.settings.clone(), history: self.history.clone(), step: self.state.step };
        let text = serde_json::to_vec(&text)?;
        tensors.insert(TEXT.to_string(), TensorData::new(TEXT, Dtype::U8, vec![text.len()], text)?);
        replace(&directory.join(FILE), &to_safetensors(&tensors)?)
    }

    /// Reads the file of a directory.
    pub(crate) fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        Self::parse(&bytes).with_context(|| path.display().to_string())
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let file = TensorFile::parse(bytes)?;
        let Text { settings, history, step } = serde_json::from_slice(&file.read(TEXT)?).context(TEXT)?;
        let mut tensors = BTreeMap::new();
        for full in file.names().filter(|name| *name != TEXT) {
            let Some(name) = full.strip_suffix(&format!(".{}", PARTS[0])) else { continue };
            let mut parts = [const { Vec::new() }; 3];
            for (values, part) in parts.iter_mut().zip(PARTS) {
                let bytes = file.read(&format!("{name}.{part}"))?;
                ensure!(bytes.len() % 4 == 0, "{name}.{part}: {} bytes are no f32 values", bytes.len());
                *values = bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
            }
            tensors.insert(name.to_string(), parts);
        }
        Ok(Self { settings, history, state: State { tensors, step } })
    }
}

/// Writes a file beside its place, syncs it, and renames it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| path.display().to_string())
}
