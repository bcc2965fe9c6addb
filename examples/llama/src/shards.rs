//! The tensors of a model in one or more safetensors files.

use alloc::borrow::{Cow, ToOwned};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use nf4::SharedBytes;
use nf4::checkpoint::{CheckpointError, SharedFile, TensorInfo, TensorSource};
use serde_json::Value;

use crate::error::Error;

/// The files of a model, whose tensors stay where they are.
#[derive(Debug, Default)]
pub struct Shards {
    files: Vec<SharedFile>,
    /// In which file a tensor is.
    homes: BTreeMap<String, usize>,
}

impl Shards {
    /// Adds a file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not a safetensors file; [`Error::Unsupported`] if one of its tensors is in another
    /// file too.
    pub fn add(&mut self, bytes: SharedBytes) -> Result<(), Error> {
        let file = SharedFile::parse(bytes)?;
        for (name, _) in file.header().iter() {
            if self.homes.insert(name.to_string(), self.files.len()).is_some() {
                let reason = "in two files of the model".to_string();
                return Err(Error::Unsupported { what: name.to_string(), reason });
            }
        }
        self.files.push(file);
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&SharedFile> {
        self.files.get(*self.homes.get(name)?)
    }
}

impl TensorSource for Shards {
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

/// The names of the files that a `model.safetensors.index.json` lists, each once.
///
/// # Errors
/// [`Error::Index`] if the text is not such an index, or names files in other folders.
pub fn shard_names(index: &[u8]) -> Result<Vec<String>, Error> {
    let fail = |reason: &str| Error::Index { reason: reason.to_string() };
    let text: Value = serde_json::from_slice(index).map_err(|error| fail(&error.to_string()))?;
    let map = text.get("weight_map").and_then(Value::as_object).ok_or_else(|| fail("no weight_map"))?;
    let mut names = BTreeSet::new();
    for (tensor, shard) in map {
        // Of both systems' separators, and neither the folder itself nor the one above it.
        let plain = |name: &&str| !name.is_empty() && !name.contains(['/', '\\', ':']) && *name != "." && *name != "..";
        let Some(name) = shard.as_str().filter(plain) else {
            return Err(fail(&alloc::format!("the file of {tensor} is not a plain file name")));
        };
        names.insert(name.to_owned());
    }
    if names.is_empty() { Err(fail("weight_map is empty")) } else { Ok(names.into_iter().collect()) }
}
