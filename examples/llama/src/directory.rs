//! A Hugging Face directory: `config.json`, and one or more safetensors files, which are mapped.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nf4::SharedBytes;
use nf4::checkpoint::{CheckpointError, PeftAdapter, TensorFile, TensorInfo, TensorSource};

use crate::config::Config;
use crate::map::map;
use crate::shards::{Shards, shard_names};

/// The files of a model.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    shards: Shards,
}

impl Directory {
    /// Opens a directory with `model.safetensors`, or with `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// If a file is missing or not what its name says; the message names it.
    pub fn open(path: &Path) -> Result<Self> {
        let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        let files = if single.exists() {
            alloc::vec![single]
        } else {
            let at = || index.display().to_string();
            ensure!(index.exists(), "{}: no model.safetensors and no model.safetensors.index.json", path.display());
            let names = shard_names(&fs::read(&index).with_context(at)?).with_context(at)?;
            names.into_iter().map(|name| path.join(name)).collect()
        };
        let mut shards = Shards::default();
        for file in files {
            let at = || file.display().to_string();
            let bytes = map(&file).with_context(at)?;
            shards.add(Arc::new(bytes)).with_context(at)?;
        }
        Ok(Self { path: path.to_owned(), shards })
    }

    /// What its `config.json` says.
    ///
    /// # Errors
    /// The errors of [`Config::parse`]; if the file cannot be read.
    pub fn config(&self) -> Result<Config> {
        let path = self.path.join("config.json");
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        Config::parse(&text).with_context(|| self.path.display().to_string())
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
}

impl TensorSource for Directory {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.shards.names()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.shards.info(name)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        self.shards.read(name)
    }

    fn shared(&self, name: &str) -> Option<(SharedBytes, Range<usize>)> {
        self.shards.shared(name)
    }
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
