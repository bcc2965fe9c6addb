//! The 4-bit tensors of a model, which tensors describe them, and what is packed otherwise.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context, Result};
use nf4::checkpoint::{
    CheckpointError, ForeignTensor, Linear4bit, QuantState, TensorSource, foreign_tensors, packed_tensors,
};

use crate::model::Model;

/// A 4-bit tensor, of which only the description was read.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) state: QuantState,
    /// Bytes of weights, scales, maps and JSON.
    pub(crate) bytes: u64,
}

/// The packed tensors of a model.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    pub(crate) by_tensor: BTreeMap<String, Layer>,
    /// All tensors that describe them.
    pub(crate) companions: HashSet<String>,
    /// What is wrong with those that are not as they should be.
    pub(crate) broken: Vec<CheckpointError>,
    /// The tensors of these, as far as they are there.
    pub(crate) broken_parts: HashSet<String>,
    /// What is packed in other formats.
    pub(crate) foreign: Vec<ForeignTensor>,
}

impl Layers {
    /// Reads headers and descriptions. A broken tensor is kept as its error.
    pub(crate) fn read(model: &Model) -> Self {
        let mut layers = Self { foreign: foreign_tensors(model), ..Self::default() };
        let names: BTreeSet<&str> = model.names().collect();
        for tensor in packed_tensors(model) {
            match QuantState::load(model, &tensor).and_then(|state| Ok((state.tensor_infos(&tensor)?, state))) {
                Ok((infos, state)) => {
                    let size = |name: &String| model.info(name).map_or(0, |i| i.data_offsets.1 - i.data_offsets.0);
                    let bytes = infos.iter().map(|(name, _)| size(name)).sum::<usize>() as u64;
                    layers.companions.extend(infos.into_iter().map(|(name, _)| name).filter(|name| *name != tensor));
                    layers.by_tensor.insert(tensor, Layer { state, bytes });
                }
                Err(error) => {
                    let start = format!("{tensor}.");
                    let parts = names.range(&*start..).take_while(|name| name.starts_with(&start));
                    layers.broken_parts.extend(parts.map(|name| (*name).to_owned()));
                    layers.broken_parts.insert(tensor);
                    layers.broken.push(error);
                }
            }
        }
        layers
    }

    /// What is not understood of the model, one line for each tensor.
    pub(crate) fn not_understood(&self) -> impl Iterator<Item = String> {
        self.foreign.iter().map(|tensor| tensor.error("is not understood").to_string())
    }
}

/// Reads the weights and scales of a packed tensor.
pub(crate) fn load(model: &Model, tensor: &str) -> Result<Linear4bit> {
    Linear4bit::load_tensor(model, tensor).with_context(|| model.path.display().to_string())
}
