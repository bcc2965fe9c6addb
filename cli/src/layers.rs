//! The 4-bit layers of a model, and which tensors belong to them.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result};
use nf4::checkpoint::{CheckpointError, Linear4bit, QuantState, TensorSource, linear4bit_prefixes};

use crate::model::Model;

/// A 4-bit layer, of which only the description was read.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) prefix: String,
    pub(crate) state: QuantState,
    /// Bytes of weight, scales, maps and JSON.
    pub(crate) bytes: u64,
}

/// The layers of a model by the names of their weights.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    pub(crate) by_weight: BTreeMap<String, Layer>,
    /// All other tensors of the layers.
    pub(crate) companions: HashSet<String>,
    /// What is wrong with layers that are not as they should be.
    pub(crate) broken: Vec<CheckpointError>,
    /// The tensors of these, as far as they are there.
    pub(crate) broken_parts: HashSet<String>,
}

impl Layers {
    /// Reads headers and descriptions. A broken layer is kept as its error.
    pub(crate) fn read(model: &Model) -> Self {
        let mut layers = Self::default();
        for prefix in linear4bit_prefixes(model) {
            match QuantState::load(model, &prefix).and_then(|state| Ok((state.tensor_infos(&prefix)?, state))) {
                Ok((infos, state)) => {
                    let mut names = infos.into_iter().map(|(name, _)| name);
                    let weight = names.next().unwrap_or_default();
                    let rest: Vec<String> = names.collect();
                    let size = |name: &String| model.info(name).map_or(0, |i| i.data_offsets.1 - i.data_offsets.0);
                    let bytes = rest.iter().chain([&weight]).map(size).sum::<usize>() as u64;
                    layers.companions.extend(rest);
                    layers.by_weight.insert(weight, Layer { prefix, state, bytes });
                }
                Err(error) => {
                    let weight = if prefix.is_empty() { "weight".to_owned() } else { format!("{prefix}.weight") };
                    let is_part = |name: &&str| {
                        name.strip_prefix(&*weight).is_some_and(|end| end.is_empty() || end.starts_with('.'))
                    };
                    layers.broken_parts.extend(model.names().filter(is_part).map(str::to_owned));
                    layers.broken.push(error);
                }
            }
        }
        layers
    }

    /// As [`Self::read`]; a broken layer is an error.
    pub(crate) fn read_all(model: &Model) -> Result<Self> {
        let mut layers = Self::read(model);
        match layers.broken.is_empty() {
            true => Ok(layers),
            false => Err(layers.broken.remove(0)).with_context(|| model.path.display().to_string()),
        }
    }
}

/// Reads the weight, scales and bias of a layer.
pub(crate) fn load(model: &Model, layer: &Layer) -> Result<Linear4bit> {
    Linear4bit::load(model, &layer.prefix).with_context(|| model.path.display().to_string())
}
