//! A Hugging Face directory: `config.json`, and one or more safetensors files, which are mapped.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nf4::SharedBytes;
use nf4::checkpoint::{CheckpointError, PeftAdapter, SharedFile, TensorFile, TensorInfo, TensorSource};
use serde_json::Value;

use crate::config::Config;
use crate::map::map;

/// The files of a model.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    shards: Vec<SharedFile>,
    /// In which shard a tensor is.
    homes: HashMap<String, usize>,
}

impl Directory {
    /// Opens a directory with `model.safetensors`, or with `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// If a file is missing or not what its name says; the message names it.
    pub fn open(path: &Path) -> Result<Self> {
        let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        let files = if single.exists() { alloc::vec![single] } else { shards(path, &index)? };
        let mut directory = Self { path: path.to_owned(), shards: Vec::new(), homes: HashMap::new() };
        for file in files {
            let bytes = map(&file).with_context(|| file.display().to_string())?;
            let shard = SharedFile::parse(Arc::new(bytes)).with_context(|| file.display().to_string())?;
            for (name, _) in shard.header().iter() {
                let twice = directory.homes.insert(name.to_string(), directory.shards.len()).is_some();
                ensure!(!twice, "{}: tensor {name} is in another file too", file.display());
            }
            directory.shards.push(shard);
        }
        Ok(directory)
    }

    /// What its `config.json` says.
    ///
    /// # Errors
    /// Those of [`Config::parse`]; if the file cannot be read.
    pub fn config(&self) -> Result<Config> {
        let path = self.path.join("config.json");
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        Config::parse(&text).with_context(|| self.path.display().to_string())
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_len(&self) -> usize {
        self.shards.iter().map(|shard| shard.header().data_len()).sum()
    }

    /// The text of a file beside the weights, if it is there.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path.join(name);
        if !path.exists() {
            return Ok(None);
        }
        fs::read(&path).map(Some).with_context(|| path.display().to_string())
    }

    fn find(&self, name: &str) -> Option<&SharedFile> {
        Some(&self.shards[*self.homes.get(name)?])
    }
}

impl TensorSource for Directory {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.homes.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.find(name)?.info(name)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        self.find(name).ok_or_else(|| CheckpointError::Missing { tensor: name.to_string() })?.read(name)
    }

    fn shared(&self, name: &str) -> Option<(SharedBytes, Range<usize>)> {
        self.find(name)?.shared(name)
    }
}

/// The files that an index names.
fn shards(directory: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let at = || index.display().to_string();
    ensure!(index.exists(), "{}: no model.safetensors and no model.safetensors.index.json", directory.display());
    let text: Value = serde_json::from_slice(&fs::read(index).with_context(at)?).with_context(at)?;
    let Some(map) = text.get("weight_map").and_then(Value::as_object) else { bail!("{}: no weight_map", at()) };
    let mut names = Vec::new();
    for (tensor, shard) in map {
        let plain = |shard: &&str| {
            let mut parts = Path::new(shard).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        };
        let shard = shard.as_str().filter(plain);
        let Some(shard) = shard else { bail!("{}: the shard of {tensor} is not a plain file name", at()) };
        names.push(shard);
    }
    names.sort_unstable();
    names.dedup();
    ensure!(!names.is_empty(), "{}: weight_map is empty", at());
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

/// Reads the adapter in a directory of PEFT.
///
/// # Errors
/// If a file is missing or not understood; the message names it.
pub fn read_adapter(path: &Path) -> Result<PeftAdapter> {
    let config = path.join("adapter_config.json");
    let config = fs::read(&config).with_context(|| config.display().to_string())?;
    let weights = path.join("adapter_model.safetensors");
    let bytes = map(&weights).with_context(|| weights.display().to_string())?;
    let file = TensorFile::parse(&bytes).with_context(|| weights.display().to_string())?;
    PeftAdapter::load(&config, &file).with_context(|| path.display().to_string())
}
