//! What an adapter changes.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;

use super::super::error::CheckpointError;
use super::super::names::{Ends, join, last};
use super::super::peft::{Factors, PeftAdapter, PeftModule, PeftModuleKind};
use super::super::read::float_type;
use super::super::source::TensorMap;
use super::embeddings::{Embedding, is_head};
use super::matching::ModelNames;
use super::{Builder, Change, NOT_GATHERED, Note, Origin, Pair, Planned, planned};

/// The parts of a fused parameter of experts, in its order, as files have them for each expert.
const FUSED: [(&str, &[&[&str]]); 2] =
    [("gate_up_proj", &[&["gate_proj", "w1"], &["up_proj", "w3"]]), ("down_proj", &[&["down_proj", "w2"]])];

/// Names of the adapter's modules in the model.
pub(super) type Names<'n> = BTreeMap<&'n str, String>;

impl Builder<'_> {
    pub(super) fn adapt(&mut self, adapter: &PeftAdapter) -> Result<(), CheckpointError> {
        let names = self.names(adapter)?;
        let embedding = self.embedding(adapter);
        self.place_tensors(adapter, &names, &embedding)?;
        // Before anything is added to the input embedding: an output head of its own starts from that of the base.
        let before = embedding.as_ref().map(|found| (found, self.plan.get(&found.tensor).cloned()));
        for (module, pair) in adapter.modules() {
            let name = &names[module];
            let tensor = self.weight(name, before.as_ref())?;
            self.add_pair(adapter, module, pair, name, &tensor)?;
            self.merged.push(name.clone());
        }
        let targets = adapter.config().target_parameters().iter();
        let targets = Ends::new(targets.map(|target| (target.as_str(), ())));
        for (module, _) in adapter.parameters() {
            self.add_parameters(adapter, &targets, module, &names[module])?;
            self.merged.push(names[module].clone());
        }
        for (module, tokens) in adapter.tokens() {
            let name = &names[module.as_str()];
            let tensor = self.weight(name, before.as_ref())?;
            let change = Change::Tokens { module: module.clone() };
            let planned = self.planned_mut(&tensor)?;
            let [rows, cols] = planned.matrix;
            if let Some(token) = tokens.indices().iter().find(|token| **token >= rows) {
                let reason = format!("token {token} was trained, but there are {rows} rows");
                return Err(CheckpointError::Unexpected { tensor, reason });
            }
            if tokens.width != cols {
                let (expected, got) =
                    (alloc::vec![tokens.indices().len(), cols], alloc::vec![tokens.indices().len(), tokens.width]);
                return Err(CheckpointError::Shape {
                    tensor: format!("{module}.token_adapter.trainable_tokens_delta"),
                    expected,
                    got,
                });
            }
            planned.changes.push(change);
            self.merged.push(name.clone());
        }
        self.settle_embeddings(adapter, &names, before)?;
        self.merged.sort_unstable();
        Ok(())
    }

    /// The names of all modules of the adapter in the model.
    fn names<'n>(&mut self, adapter: &'n PeftAdapter) -> Result<Names<'n>, CheckpointError> {
        let owner = |tensor: &'n String| tensor.rsplit_once('.').map_or("", |(module, _)| module);
        let whole: BTreeSet<&str> = adapter.replaced().keys().chain(adapter.bases().keys()).map(owner).collect();
        let pairs: BTreeSet<&str> =
            adapter.modules().map(|(name, _)| name).chain(adapter.parameters().map(|(name, _)| name)).collect();
        let tokens = adapter.tokens().keys().map(String::as_str);
        let all: BTreeSet<&str> = whole.iter().copied().chain(pairs.iter().copied()).chain(tokens).collect();
        let model = ModelNames::new(self.plan.keys().map(String::as_str));
        let expert = |module: &str| fused_expert(module).is_some_and(|(owner, ..)| model.has(&owner));
        let may_be_new = |module: &str| {
            module.is_empty()
                || is_head(module)
                || expert(module)
                || (whole.contains(module) && !pairs.contains(module))
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
        let bases = adapter.bases().keys().filter(|tensor| !adapter.replaced().contains_key(*tensor));
        let bases = bases.map(|tensor| (tensor, adapter.bases(), Origin::AdapterBase(tensor.clone())));
        let replaced = adapter.replaced().keys();
        let replaced = replaced.map(|tensor| (tensor, adapter.replaced(), Origin::Replaced(tensor.clone())));
        for (tensor, tensors, origin) in bases.chain(replaced) {
            let (module, part) = tensor.rsplit_once('.').unwrap_or(("", tensor));
            let name = join(names.get(module).map_or(module, String::as_str), part);
            self.place(adapter, &name, tensors, tensor, origin, embedding)?;
        }
        Ok(())
    }

    fn place(
        &mut self,
        adapter: &PeftAdapter,
        name: &str,
        tensors: &TensorMap<'static>,
        tensor: &str,
        origin: Origin,
        embedding: &Option<Embedding>,
    ) -> Result<(), CheckpointError> {
        let (dtype, shape) = (tensors[tensor].dtype(), tensors[tensor].shape());
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let mut info = safetensors::tensor::TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (0, 0) };
        // What was to be saved as a whole may be new, or have other labels than in the base.
        let is_new = matches!(origin, Origin::Replaced(_)) && adapter.is_saved(tensor);
        match self.plan.get(name) {
            Some(base) => {
                let of = |dtype: Dtype| float_type(name, dtype);
                if of(dtype).is_ok() && of(base.info.dtype).is_ok() {
                    info.dtype = base.info.dtype;
                }
                if base.info.shape != shape {
                    let is_vocabulary = embedding.as_ref().is_some_and(|e| e.tensor == name) || is_head(module);
                    let fits = is_vocabulary
                        && base.info.shape.len() == shape.len()
                        && base.info.shape.get(1..) == shape.get(1..);
                    let is_label = is_new && base.info.shape.get(1..) == shape.get(1..);
                    if !fits && !is_label {
                        let (expected, got) = (base.info.shape.clone(), shape.to_vec());
                        return Err(CheckpointError::Shape { tensor: name.to_owned(), expected, got });
                    }
                    let (from, to) = (base.info.shape.clone(), shape.to_vec());
                    self.notes.push(Note::Resized { tensor: name.to_owned(), from, to });
                }
            }
            None if is_head(module) || is_new => {
                if float_type(name, dtype).is_ok() {
                    info.dtype = self.main.dtype();
                }
                self.notes.push(Note::Added { tensor: name.to_owned(), shape: shape.to_vec() });
            }
            None => return Err(self.missing(name)),
        }
        let mut planned = planned(name, origin, &info)?;
        planned.transposed = false;
        self.plan.insert(name.to_owned(), planned);
        if !self.is_embedding_name(module) {
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

    fn add_pair(
        &mut self,
        adapter: &PeftAdapter,
        module: &str,
        pair: &PeftModule,
        name: &str,
        tensor: &str,
    ) -> Result<(), CheckpointError> {
        pair.adapter().pair().map_err(|error| CheckpointError::Layer { layer: module.to_owned(), error })?;
        let [d_out, d_in] = [pair.adapter().d_out(), pair.adapter().d_in()];
        if !self.plan.contains_key(tensor) {
            return self.add_to_fused(module, pair, name);
        }
        self.check_is_float(tensor)?;
        let conv1d = self.config.as_ref().map(|_| self.is_conv1d(tensor));
        let planned = self.planned_mut(tensor)?;
        let shape = &planned.info.shape;
        let mut matrix = planned.matrix;
        let transposed = match pair.kind() {
            PeftModuleKind::Embedding => true,
            PeftModuleKind::Convolution(kernel) => {
                if shape.get(2..).is_none_or(|inner| inner != kernel) {
                    let (expected, got) = (kernel.clone(), shape.get(2..).unwrap_or_default().to_vec());
                    return Err(CheckpointError::Shape { tensor: format!("the kernel of {tensor}"), expected, got });
                }
                matrix = [shape[0], shape[1..].iter().product()];
                false
            }
            PeftModuleKind::Linear => match conv1d {
                // A 4-bit one is `[out, in]` until it is transposed, after everything else.
                Some(true) => !planned.transposed,
                // PEFT sets the flag by the class of the module, and what has no `Conv1D` is a `Linear`.
                Some(false) => matrix != [d_out, d_in] && adapter.config().fan_in_fan_out(),
                None => adapter.config().fan_in_fan_out() && !matches!(planned.origin, Origin::Packed(_)),
            },
        };
        let base = if transposed { [matrix[1], matrix[0]] } else { matrix };
        if base != [d_out, d_in] {
            let error = crate::Error::Mismatch { base, adapter: [d_out, d_in] };
            return Err(CheckpointError::Layer { layer: name.to_owned(), error });
        }
        planned.matrix = matrix;
        let module = module.to_owned();
        planned
            .changes
            .push(Change::LowRank { rows: 0..matrix[0], pair: Pair::Module { module: module.clone(), transposed } });
        if pair.lora_bias().is_some() {
            let bias = join(name, "bias");
            // As in PEFT, the base must have one.
            if !self.plan.contains_key(&bias) {
                return Err(CheckpointError::Missing { tensor: bias });
            }
            self.check_is_float(&bias)?;
            let planned = self.planned_mut(&bias)?;
            if planned.info.shape != [d_out] {
                let (expected, got) = (alloc::vec![d_out], planned.info.shape.clone());
                return Err(CheckpointError::Shape { tensor: bias, expected, got });
            }
            planned.matrix = [d_out, 1];
            planned.changes.push(Change::LowRank { rows: 0..d_out, pair: Pair::Bias { module } });
        }
        self.touched.push(name.to_owned());
        Ok(())
    }

    /// The pair of a layer of one expert, in a file that has all experts in one tensor.
    fn add_to_fused(&mut self, module: &str, pair: &PeftModule, name: &str) -> Result<(), CheckpointError> {
        let Some((owner, expert, parameter, part, parts)) = fused_expert(name) else {
            return Err(self.missing(&join(name, "weight")));
        };
        let tensor = join(&owner, parameter);
        self.check_is_float(&tensor)?;
        let planned = self.planned_mut(&tensor)?;
        let [d_out, d_in] = [pair.adapter().d_out(), pair.adapter().d_in()];
        let shape = &planned.info.shape;
        let expected = [*shape.first().unwrap_or(&0), d_out.saturating_mul(parts), d_in];
        if *shape != expected || expert >= expected[0] || pair.lora_bias().is_some() {
            let (expected, got) = (expected.to_vec(), shape.clone());
            return Err(CheckpointError::Shape {
                tensor: format!("{tensor}, for the adapter of {module}"),
                expected,
                got,
            });
        }
        let first = (expert * parts + part) * d_out;
        let pair = Pair::Module { module: module.to_owned(), transposed: false };
        planned.changes.push(Change::LowRank { rows: first..first + d_out, pair });
        self.touched.push(owner);
        Ok(())
    }

    /// The pairs of the parameters of a module.
    fn add_parameters(
        &mut self,
        adapter: &PeftAdapter,
        targets: &Ends<'_, ()>,
        module: &str,
        name: &str,
    ) -> Result<(), CheckpointError> {
        let mut free: Vec<String> = self.candidates(targets, module, name);
        for (depth, factors) in adapter.factors(module).iter().enumerate() {
            let place = |parameter: &String| self.parameter(adapter, module, name, parameter, depth, factors);
            let found: Vec<(String, Vec<(String, Change)>)> =
                free.iter().filter_map(|parameter| Some((parameter.clone(), place(parameter)?))).collect();
            let shapes = || format!("A {:?} and B {:?}", factors.a_shape, factors.b_shape);
            let [(parameter, changes)] = &*found else {
                let what = if found.is_empty() { "no parameter" } else { "more than one parameter" };
                let names: Vec<&str> = free.iter().map(String::as_str).collect();
                let reason = format!("{} fit {what} of target_parameters that it has ({})", shapes(), names.join(", "));
                return Err(CheckpointError::Unexpected { tensor: name.to_owned(), reason });
            };
            for (tensor, change) in changes {
                self.check_is_float(tensor)?;
                self.planned_mut(tensor)?.changes.push(change.clone());
            }
            free.retain(|other| other != parameter);
        }
        self.touched.push(name.to_owned());
        Ok(())
    }

    /// The parameters of a module that the configuration targets.
    fn candidates(&self, targets: &Ends<'_, ()>, module: &str, name: &str) -> Vec<String> {
        let prefix = format!("{name}.");
        let in_file = self.plan.range(prefix.clone()..).map_while(|(tensor, _)| tensor.strip_prefix(&prefix));
        let own = in_file.filter(|rest| !rest.contains('.')).map(str::to_owned);
        let fused = FUSED.iter().map(|(parameter, _)| (*parameter).to_owned());
        let all: BTreeSet<String> = own.chain(fused).collect();
        let targeted = |parameter: &String| targets.of(&join(module, parameter)).next().is_some();
        all.into_iter().filter(targeted).collect()
    }

    /// What a pair does to the tensors of a parameter, if its shapes fit.
    fn parameter(
        &self,
        adapter: &PeftAdapter,
        module: &str,
        name: &str,
        parameter: &str,
        depth: usize,
        factors: &Factors,
    ) -> Option<Vec<(String, Change)>> {
        let key = join(module, parameter);
        let (rank, alpha) = (adapter.config().rank(&key), adapter.config().alpha(&key));
        let ([columns, d_in], d_out) = (factors.a_shape, factors.b_shape[0]);
        let experts = columns / rank;
        if experts == 0 || experts * rank != columns {
            return None;
        }
        let change = |rows: Range<usize>, expert, first, transposed| Change::LowRank {
            rows,
            pair: Pair::Expert { module: module.to_owned(), depth, expert, experts, rank, alpha, first, transposed },
        };
        let tensor = join(name, parameter);
        if let Some(planned) = self.plan.get(&tensor) {
            let [count, rows, cols] = match *planned.info.shape {
                [rows, cols] => [1, rows, cols],
                [count, rows, cols] => [count, rows, cols],
                _ => return None,
            };
            let plain = [rows, cols] == [d_out, d_in];
            // Where both fit, the class of the model decides.
            let transposed = [cols, rows] == [d_out, d_in] && (!plain || self.has_transposed_experts);
            if count != experts || !(plain || transposed) {
                return None;
            }
            let each = (0..count).map(|e| (tensor.clone(), change(e * rows..(e + 1) * rows, e, 0, transposed)));
            return Some(each.collect());
        }
        // The file has a tensor for each expert and part.
        let (_, parts) = FUSED.iter().find(|(known, _)| *known == parameter)?;
        let mut changes = Vec::new();
        for expert in 0..experts {
            let mut first = 0;
            for synonyms in *parts {
                let tensor = synonyms
                    .iter()
                    .map(|part| format!("{name}.{expert}.{part}.weight"))
                    .find(|t| self.plan.contains_key(t))?;
                let [rows, cols] = self.plan[&tensor].matrix;
                if cols != d_in {
                    return None;
                }
                changes.push((tensor, change(0..rows, expert, first, false)));
                first += rows;
            }
            if first != d_out {
                return None;
            }
        }
        let next = format!("{name}.{experts}.{}.weight", parts[0][0]);
        (!self.plan.contains_key(&next)).then_some(changes)
    }

    /// `Ok` if a tensor has values that something can be added to.
    fn check_is_float(&self, tensor: &str) -> Result<(), CheckpointError> {
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

/// The experts that a layer of one of them belongs to, its number, the fused parameter, and which part of how many of
/// that it is.
fn fused_expert(module: &str) -> Option<(String, usize, &'static str, usize, usize)> {
    let (expert, part) = module.rsplit_once('.')?;
    let (owner, number) = expert.rsplit_once('.')?;
    let number = number.parse().ok().filter(|_| last(owner) == "experts")?;
    FUSED.iter().find_map(|(parameter, parts)| {
        let at = parts.iter().position(|synonyms| synonyms.contains(&part))?;
        Some((owner.to_string(), number, *parameter, at, parts.len()))
    })
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
