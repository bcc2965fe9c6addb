//! A model on disk: a single safetensors file, or a directory with one or with shards and an index, and `config.json`.

use core::ops::Range;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nf4::checkpoint::{CheckpointError, ModelConfig, TensorSource};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};

use crate::hub;
use crate::inputs::Inputs;
use crate::memory;
use crate::shard::{SINGLE, Shard};

pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";

/// No index is larger than the largest header of a shard, and no configuration as large.
const MAX_INDEX: u64 = 100_000_000;
pub(crate) const MAX_CONFIG: u64 = 4_000_000;

/// All shards of a model, open, and where each tensor is.
#[derive(Debug)]
pub(crate) struct Model {
    /// The path that was given.
    pub(crate) path: PathBuf,
    /// The directory, if the path is one.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) shards: Vec<Shard>,
    /// The index, if there is one.
    pub(crate) index: Option<Map<String, Value>>,
    /// The text of `config.json`, if there is one; a JSON object.
    pub(crate) config: Option<Vec<u8>>,
    /// All that was opened.
    pub(crate) inputs: Inputs,
    homes: HashMap<String, usize>,
}

impl Model {
    /// Opens a file or a directory; reads headers and JSON, no data.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let path = &*hub::resolve(path)?;
        let kind = fs::metadata(path).with_context(|| path.display().to_string())?;
        let mut inputs = Inputs::default();
        if !kind.is_dir() {
            let shard = Shard::open(path, &mut inputs)?;
            return Self::from_shards(path, None, vec![shard], None, None, inputs);
        }
        inputs.note(path)?;
        let config_path = path.join(CONFIG);
        let config =
            if is_there(&config_path)? { Some(read_small(&config_path, MAX_CONFIG, &mut inputs)?) } else { None };
        // As transformers does: the single file comes first.
        let (single, index_path) = (path.join(SINGLE), path.join(INDEX));
        if is_there(&single)? {
            let shard = Shard::open(&single, &mut inputs)?;
            return Self::from_shards(path, Some(path.to_owned()), vec![shard], None, config, inputs);
        }
        if !is_there(&index_path)? {
            let pickle =
                ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|p| path.join(p).exists());
            if let Some(pickle) = pickle {
                bail!("{}: {}", path.join(pickle).display(), hub::PICKLE);
            }
            bail!("{}: no {SINGLE} and no {INDEX}", path.display());
        }
        let index = read_small(&index_path, MAX_INDEX, &mut inputs)?;
        let index = parse_object(&index).with_context(|| index_path.display().to_string())?;
        let map = weight_map(&index).with_context(|| index_path.display().to_string())?;
        let mut names: Vec<&str> = map.iter().map(|(_, shard)| *shard).collect();
        names.sort_unstable();
        names.dedup();
        let mut open = |name: &&str| {
            Shard::open(&path.join(name), &mut inputs)
                .with_context(|| format!("{} names this shard", index_path.display()))
        };
        let shards = names.iter().map(&mut open).collect::<Result<Vec<_>>>()?;
        for (tensor, shard) in &map {
            let home = names.binary_search(shard).map(|i| &shards[i]);
            let found = home.is_ok_and(|home| home.header.get(tensor).is_some());
            ensure!(found, "{}: tensor {tensor} is not in {shard}", index_path.display());
        }
        Self::from_shards(path, Some(path.to_owned()), shards, Some(index), config, inputs)
    }

    fn from_shards(
        path: &Path,
        directory: Option<PathBuf>,
        shards: Vec<Shard>,
        index: Option<Map<String, Value>>,
        config: Option<Vec<u8>>,
        inputs: Inputs,
    ) -> Result<Self> {
        let mut homes = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if let Some(other) = homes.insert(name.to_owned(), i) {
                    bail!("tensor {name} is in {} and in {}", shards[other].path.display(), shard.path.display());
                }
            }
        }
        Ok(Self { path: path.to_owned(), directory, shards, index, config, inputs, homes })
    }

    /// The shard that holds a tensor, and the tensor's type and shape.
    pub(crate) fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let shard = &self.shards[*self.homes.get(name)?];
        Some((shard, shard.header.get(name)?))
    }

    /// The fields of `config.json`, if there is one.
    pub(crate) fn config_fields(&self) -> Result<Option<Map<String, Value>>> {
        let at = || self.path.join(CONFIG).display().to_string();
        let parse = |text| -> Result<_> { Ok(ModelConfig::parse(text).with_context(at)?.fields().clone()) };
        self.config.as_deref().map(parse).transpose()
    }

    /// Bytes of all tensors.
    pub(crate) fn data_len(&self) -> u64 {
        self.shards.iter().map(|s| s.header.data_len() as u64).sum()
    }

    /// Files of the directory that belong to the model beside its weights (tokenizer, generation settings, licence),
    /// and the names of those that are left behind: directories, hidden files, weights in other formats.
    pub(crate) fn other_files(&self) -> Result<(Vec<PathBuf>, Vec<String>)> {
        const WEIGHTS: [&str; 12] =
            ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "npz", "ot"];
        let (mut copied, mut left) = (Vec::new(), Vec::new());
        let Some(directory) = &self.directory else { return Ok((copied, left)) };
        let shards: HashSet<&str> = self.shards.iter().map(Shard::name).collect();
        for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
            let path = entry.with_context(|| directory.display().to_string())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if [CONFIG, INDEX].contains(&&*name) || shards.contains(&*name) {
                continue;
            }
            let weights = path.extension().and_then(|e| e.to_str()).is_some_and(|e| WEIGHTS.contains(&e));
            let index_of_weights = name.ends_with(".index.json");
            if path.is_file() && !weights && !index_of_weights && !name.starts_with('.') {
                copied.push(path);
            } else {
                left.push(name);
            }
        }
        copied.sort_unstable();
        left.sort_unstable();
        Ok((copied, left))
    }
}

impl TensorSource for Model {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.shards.iter().flat_map(Shard::names))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        Some(self.find(name)?.1)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let (shard, _) = self.find(name).ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() })?;
        let failed = |e: std::io::Error| CheckpointError::Read { tensor: shard.at(name), reason: e.to_string() };
        Ok(Cow::Owned(shard.read(name).map_err(failed)?))
    }

    fn read_range(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let (shard, _) = self.find(name).ok_or_else(|| CheckpointError::Missing { tensor: name.to_owned() })?;
        let read = || -> Result<Vec<u8>> {
            let mut bytes = memory::filled(range.len(), 0)?;
            shard.read_part(name, range.start as u64, &mut bytes)?;
            Ok(bytes)
        };
        let failed =
            |e: anyhow::Error| CheckpointError::Read { tensor: shard.at(name), reason: e.root_cause().to_string() };
        Ok(Cow::Owned(read().map_err(failed)?))
    }
}

/// Whether a directory has an entry of this name, even if that is a link to nothing.
pub(crate) fn is_there(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        result => result.map(|_| true).with_context(|| path.display().to_string()),
    }
}

fn parse_object(text: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(text).context("not JSON")? {
        Value::Object(object) => Ok(object),
        _ => bail!("JSON, but not an object"),
    }
}

/// The most memory that JSON takes, parsed, for each byte of its text: a value of two characters is 32 bytes long, and
/// an array moves to one of twice its size when it is full.
const JSON_FACTOR: usize = 48;

/// A whole file of JSON, of at most this many bytes, if there is room to parse it.
pub(crate) fn read_small(path: &Path, most: u64, inputs: &mut Inputs) -> Result<Vec<u8>> {
    let file = inputs.open(path)?;
    let read = || -> Result<_> {
        let mut text = Vec::new();
        file.take(most + 1).read_to_end(&mut text)?;
        ensure!(text.len() as u64 <= most, "more than {most} bytes of JSON");
        memory::probe(text.len().saturating_mul(JSON_FACTOR))?;
        Ok(text)
    };
    read().with_context(|| path.display().to_string())
}

/// Tensors and shards of an index. A shard must be a plain file name: an index does not reach outside its directory.
fn weight_map(index: &Map<String, Value>) -> Result<Vec<(&str, &str)>> {
    let Some(Value::Object(map)) = index.get("weight_map") else { bail!("no object `weight_map`") };
    ensure!(!map.is_empty(), "`weight_map` is empty");
    map.iter()
        .map(|(tensor, shard)| {
            let Some(shard) = shard.as_str() else { bail!("tensor {tensor}: the shard {shard} is not a string") };
            let mut parts = Path::new(shard).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            ensure!(plain, "tensor {tensor}: the shard {shard:?} is not a plain file name");
            Ok((&**tensor, shard))
        })
        .collect()
}
