//! What an adapter changes.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::tensor::TensorInfo;

use super::super::error::CheckpointError;
use super::super::names::{Ends, join, last};
use super::super::peft::{AdaptedTokens, PeftAdapter};
use super::super::quant_state::{QuantState, described, packed_tensors};
use super::super::read::float_type;
use super::super::vocabulary::{is_embedding, is_head};
use super::embeddings::Embedding;
use super::experts::fused_expert;
use super::matching::{ModelNames, Names};
use super::{Builder, Change, NOT_GATHERED, Note, Origin, Planned, planned};

impl Builder<'_> {
    pub(super) fn adapt(&mut self, adapter: &PeftAdapter) -> Result<(), CheckpointError> {
        let names = self.names(adapter)?;
        let embedding = self.embedding(adapter);
        self.place_tensors(adapter, &names, &embedding)?;
        // Where an output head of its own starts, if it shared the weight of the embedding: from that of the base, or, if it
        // has a pair, from that with its tokens, which stay shared.
        let now = |builder: &Self| embedding.as_ref().map(|found| (found, builder.plan.get(&found.tensor).cloned()));
        let before = now(self);
        for (module, tokens) in adapter.tokens() {
            self.add_tokens(module, tokens, &names[module.as_str()], before.as_ref())?;
        }
        let with_tokens = now(self);
        for (module, pair) in adapter.modules() {
            let name = &names[module];
            let tensor = self.weight(name, with_tokens.as_ref())?;
            self.add_pair(adapter, module, pair, name, &tensor)?;
            self.merged.push(name.clone());
        }
        let targets = adapter.config().target_parameters().iter();
        let targets = Ends::new(targets.map(|target| (target.as_str(), ())));
        for (module, _) in adapter.parameters() {
            self.add_parameters(adapter, &targets, module, &names[module])?;
            self.merged.push(names[module].clone());
        }
        self.settle_embeddings(adapter, &names, before)?;
        self.merged.sort_unstable();
        Ok(())
    }

    /// Replaces the rows of some tokens.
    fn add_tokens(
        &mut self,
        module: &str,
        tokens: &AdaptedTokens,
        name: &str,
        embedding: Option<&(&Embedding, Option<Planned>)>,
    ) -> Result<(), CheckpointError> {
        let tensor = self.weight(name, embedding)?;
        let planned = self.planned_mut(&tensor)?;
        let [rows, cols] = planned.matrix;
        if let Some(token) = tokens.indices().iter().find(|token| **token >= rows) {
            let reason = format!("token {token} was trained, but there are {rows} rows");
            return Err(CheckpointError::Unexpected { tensor, reason });
        }
        if tokens.width != cols {
            let shape = |width| alloc::vec![tokens.indices().len(), width];
            let tensor = format!("{module}.token_adapter.trainable_tokens_delta");
            return Err(CheckpointError::Shape { tensor, expected: shape(cols), got: shape(tokens.width) });
        }
        planned.changes.push(Change::Tokens { module: module.to_owned() });
        self.merged.push(name.to_owned());
        Ok(())
    }

    /// The names of all modules of the adapter in the model.
    fn names<'n>(&mut self, adapter: &'n PeftAdapter) -> Result<Names<'n>, CheckpointError> {
        let owner = |tensor: &'n String| tensor.rsplit_once('.').map_or("", |(module, _)| module);
        let tensors = adapter.replaced().keys().chain(adapter.bases().keys());
        let tensors = tensors.filter(|tensor| described(tensor).is_none());
        let whole: BTreeMap<&str, usize> =
            tensors.map(|tensor| (owner(tensor), adapter.saved_from(tensor).unwrap_or(tensor.len()))).collect();
        let pairs: BTreeSet<&str> =
            adapter.modules().map(|(name, _)| name).chain(adapter.parameters().map(|(name, _)| name)).collect();
        let tokens = adapter.tokens().keys().map(String::as_str);
        let others = pairs.iter().copied().chain(tokens).map(|name| (name, name.len()));
        let mut all = whole.clone();
        for (name, end) in others {
            all.entry(name).or_insert(end);
        }
        let model = ModelNames::new(self.plan.keys().map(String::as_str));
        let expert = |module: &str| fused_expert(module).is_some_and(|(owner, ..)| model.has(&owner));
        let may_be_new = |module: &str| {
            module.is_empty()
                || is_head(module)
                || expert(module)
                || (whole.contains_key(module) && !pairs.contains(module))
        };
        let names = model.map(&all, &may_be_new)?;
        let mut renamed: BTreeMap<(String, String), usize> = BTreeMap::new();
        for (from, to) in names.iter().filter(|(from, to)| *from != to) {
            *renamed.entry(changed_parts(from, to)).or_default() += 1;
        }
        self.notes.extend(renamed.into_iter().map(|((from, to), modules)| Note::Renamed { from, to, modules }));
        Ok(names)
    }

    /// Puts the tensors that the adapter has as a whole into their places.
    fn place_tensors(
        &mut self,
        adapter: &PeftAdapter,
        names: &Names<'_>,
        embedding: &Option<Embedding>,
    ) -> Result<(), CheckpointError> {
        let mut whole = Vec::new();
        let bases = adapter.bases();
        let packed = packed_tensors(bases);
        for tensor in &packed {
            let state = QuantState::load(bases, tensor)?;
            whole.push((tensor, Origin::AdapterPacked(tensor.clone()), state.dtype.dtype(), state.shape));
        }
        let is_plain = |tensor: &&String| described(tensor).is_none() && packed.binary_search(tensor).is_err();
        let plain = bases.keys().filter(is_plain).filter(|tensor| !adapter.replaced().contains_key(*tensor));
        let plain = plain.map(|tensor| (tensor, Origin::AdapterBase(tensor.clone()), &bases[tensor]));
        let replaced = adapter.replaced().iter();
        let replaced = replaced.map(|(tensor, data)| (tensor, Origin::Replaced(tensor.clone()), data));
        let plain = plain.chain(replaced);
        whole.extend(plain.map(|(tensor, origin, data)| (tensor, origin, data.dtype(), data.shape().to_vec())));
        for (tensor, origin, dtype, shape) in whole {
            let (module, part) = tensor.rsplit_once('.').unwrap_or(("", tensor));
            let name = join(names.get(module).map_or(module, String::as_str), part);
            // What was to be saved as a whole may be new, or have other labels than in the base.
            let is_new = matches!(origin, Origin::Replaced(_)) && adapter.saved_from(tensor).is_some();
            self.place(&name, origin, TensorInfo { dtype, shape, data_offsets: (0, 0) }, is_new, embedding)?;
        }
        Ok(())
    }

    fn place(
        &mut self,
        name: &str,
        origin: Origin,
        mut info: TensorInfo,
        is_new: bool,
        embedding: &Option<Embedding>,
    ) -> Result<(), CheckpointError> {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        match self.plan.get(name) {
            Some(base) => {
                if float_type(name, base.info.dtype).is_ok() {
                    float_type(name, info.dtype)?;
                    info.dtype = base.info.dtype;
                }
                if base.info.shape != info.shape {
                    let is_vocabulary = embedding.as_ref().is_some_and(|e| e.tensor == name) || is_head(module);
                    let fits = base.info.shape.get(1..) == info.shape.get(1..) && !info.shape.is_empty();
                    let (from, to) = (base.info.shape.clone(), info.shape.clone());
                    if !fits || !(is_vocabulary || is_new) {
                        return Err(CheckpointError::Shape { tensor: name.to_owned(), expected: from, got: to });
                    }
                    self.notes.push(Note::Resized { tensor: name.to_owned(), from, to });
                }
            }
            None if is_head(module) || is_new => {
                if float_type(name, info.dtype).is_ok() {
                    info.dtype = self.main.dtype();
                }
                self.notes.push(Note::Added { tensor: name.to_owned(), shape: info.shape.clone() });
            }
            None => return Err(self.missing(name)),
        }
        self.plan.insert(name.to_owned(), planned(name, origin, &info)?);
        if !is_embedding(module) {
            self.touched.push(module.to_owned());
        }
        Ok(())
    }

    /// The weight of a module; that of an output head that has none in the base is added.
    fn weight(
        &mut self,
        module: &str,
        embedding: Option<&(&Embedding, Option<Planned>)>,
    ) -> Result<String, CheckpointError> {
        let tensor = join(module, "weight");
        if self.plan.contains_key(&tensor) || fused_expert(module).is_some() {
            return Ok(tensor);
        }
        match embedding {
            Some((found, Some(base))) if is_head(module) && self.is_tied(&tensor) => {
                self.untie(&tensor, &found.tensor, base.clone());
                Ok(tensor)
            }
            _ => Err(self.missing(&tensor)),
        }
    }

    /// `Ok` if a tensor has values that something can be added to.
    pub(super) fn check_is_float(&self, tensor: &str) -> Result<(), CheckpointError> {
        let Some(planned) = self.plan.get(tensor) else { return Err(self.missing(tensor)) };
        if let Ok(at) = self.foreign.binary_search_by(|foreign| foreign.name.as_str().cmp(tensor)) {
            return Err(self.foreign[at].error("cannot be merged into"));
        }
        if planned.info.shape == [0] && last(tensor) == "weight" {
            return Err(CheckpointError::Unexpected { tensor: tensor.to_owned(), reason: NOT_GATHERED.to_owned() });
        }
        float_type(tensor, planned.info.dtype).map(drop)
    }

    pub(super) fn planned_mut(&mut self, tensor: &str) -> Result<&mut Planned, CheckpointError> {
        self.plan.get_mut(tensor).ok_or_else(|| CheckpointError::Missing { tensor: tensor.to_owned() })
    }

    /// The error that a tensor is not there, which names the format if its module is packed in another one.
    pub(super) fn missing(&self, tensor: &str) -> CheckpointError {
        let module = tensor.rsplit_once('.').map_or("", |(module, _)| module);
        let is_of = |name: &str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        match self.foreign.iter().find(|foreign| is_of(&foreign.name)) {
            Some(foreign) => foreign.error("cannot be merged into"),
            None => ModelNames::new(self.plan.keys().map(String::as_str)).missing(tensor),
        }
    }
}

/// What two names of one module do not have in common before their common end.
fn changed_parts(from: &str, to: &str) -> (String, String) {
    let common = from.rsplit('.').zip(to.rsplit('.')).take_while(|(a, b)| a == b).count();
    let start = |name: &str| {
        let parts: Vec<&str> = name.split('.').collect();
        parts[..parts.len() - common].join(".")
    };
    (start(from), start(to))
}
