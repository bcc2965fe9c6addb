//! Reading an adapter.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::read::{check_shape, info_of, owned_bytes, read_floats};
use super::super::source::{TensorData, TensorMap, TensorSource};
use super::super::vocabulary::{is_embedding, is_head};
use super::adapter::{AdaptedTokens, Factors, OwnedBytes, PeftAdapter, PeftModule, PeftModuleKind, tensor_name};
use super::config::{BiasTraining, PeftConfig};
use super::key::Key;
use super::targets::Targets;
use crate::LoRAAdapter;

/// The parts of a pair, by their names without that of the module, and the names of the tensors.
type Parts = BTreeMap<String, String>;

/// The tensors of a file, by what they are.
#[derive(Default)]
struct Sorted {
    lora: BTreeMap<(String, usize), Parts>,
    tokens: BTreeMap<String, String>,
    bases: BTreeMap<String, String>,
    whole: BTreeMap<String, String>,
    wrapped: BTreeMap<String, String>,
    /// Tensors that `modules_to_save` names, and where the name begins in theirs.
    saved: BTreeMap<String, usize>,
}

impl PeftAdapter {
    /// Reads an adapter from the text of its `adapter_config.json` and the tensors of its `adapter_model.safetensors`.
    ///
    /// # Errors
    /// * [`CheckpointError::Json`] and [`CheckpointError::Field`] for the configuration;
    /// * [`CheckpointError::Unsupported`] for a variant that is not implemented;
    /// * [`CheckpointError::Missing`] if a tensor of a pair is not there;
    /// * [`CheckpointError::Shape`] if one does not fit the rank or the other one;
    /// * [`CheckpointError::Type`] for a tensor that is not made of floats;
    /// * [`CheckpointError::Unexpected`] for tensors that nothing in the configuration explains, for two that stand for one,
    ///   for empty ones, and if there are none;
    /// * [`CheckpointError::Layer`] for NaN and infinity;
    /// * [`CheckpointError::Memory`].
    #[doc(alias = "from_pretrained")]
    pub fn load(config: &[u8], source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        let config = PeftConfig::parse(config)?;
        let sorted = Sorted::new(source, &config)?;
        config.check_work(sorted.lora.keys().map(|(module, _)| module.as_str()))?;
        let mut adapter = Self {
            modules: BTreeMap::new(),
            parameters: BTreeMap::new(),
            tokens: BTreeMap::new(),
            replaced: TensorMap::new(),
            bases: TensorMap::new(),
            saved: sorted.saved,
            config,
        };
        adapter.load_pairs(source, &sorted.lora)?;
        let targets = Targets::new(&adapter.config);
        for (module, name) in &sorted.tokens {
            adapter.tokens.insert(module.clone(), load_tokens(&targets, source, module, name)?);
        }
        for (tensor, name) in &sorted.bases {
            adapter.bases.insert(tensor.clone(), owned(source, name)?);
        }
        for (tensor, name) in sorted.whole.iter().chain(&sorted.wrapped) {
            let data = owned(source, name)?;
            match adapter.replaced.get(tensor) {
                // The plain name is the one that PEFT reads; the other one must say the same.
                Some(known) if known.bytes() == data.bytes() && known.shape() == data.shape() => {}
                Some(_) => return Err(two(name, tensor)),
                None => drop(adapter.replaced.insert(tensor.clone(), data)),
            }
        }
        // Of what was trained as a whole and has no adapter besides, the base is not needed; of what has one, it is.
        for tensor in adapter.bases.keys() {
            let module = tensor.rsplit_once('.').map_or("", |(module, _)| module);
            if adapter.replaced.contains_key(tensor) && adapter.modules.contains_key(module) {
                return Err(two(&tensor_name(module, "base_layer"), tensor));
            }
        }
        Ok(adapter)
    }

    fn load_pairs(
        &mut self,
        source: &dyn TensorSource,
        pairs: &BTreeMap<(String, usize), Parts>,
    ) -> Result<(), CheckpointError> {
        let nested: BTreeSet<&str> =
            pairs.keys().filter(|(_, depth)| *depth > 0).map(|(module, _)| module.as_str()).collect();
        let targets = Targets::new(&self.config);
        for ((module, depth), parts) in pairs {
            if nested.contains(module.as_str()) || targets.has_parameter_of(module) {
                let factors = self.parameters.entry(module.clone()).or_default();
                if factors.len() != *depth {
                    let part = format!("{}lora_A.weight", "base_layer.".repeat(factors.len()));
                    return Err(CheckpointError::Missing { tensor: tensor_name(module, &part) });
                }
                factors.push(load_factors(source, module, parts)?);
            } else {
                let loaded = load_module(&self.config, source, module, parts)?;
                self.modules.insert(module.clone(), loaded);
            }
        }
        Ok(())
    }
}

impl Sorted {
    fn new(source: &dyn TensorSource, config: &PeftConfig) -> Result<Self, CheckpointError> {
        let mut sorted = Self::default();
        let saved = Modules::new(config.modules_to_save());
        let names: BTreeSet<&str> = source.names().collect();
        check_any(&names)?;
        for name in names {
            check_is_whole(source, name)?;
            let known = match Key::parse(name)? {
                Key::Lora { module, depth, part } => {
                    let parts = sorted.lora.entry((module, depth)).or_default();
                    parts.insert(part.clone(), name.to_owned()).map(|_| part)
                }
                Key::Tokens { module } => sorted.tokens.insert(module.clone(), name.to_owned()).map(|_| module),
                Key::Base { tensor } => sorted.bases.insert(tensor.clone(), name.to_owned()).map(|_| tensor),
                Key::Whole { tensor, is_wrapped } => {
                    let saved_from = saved.find(&tensor);
                    if let Some(start) = saved_from {
                        sorted.saved.insert(tensor.clone(), start);
                    }
                    let (module, part) = tensor.rsplit_once('.').unwrap_or(("", &tensor));
                    let is_bias = config.bias() != BiasTraining::None && part == "bias";
                    // PEFT saves these of its own accord if the vocabulary was resized or they have adapters.
                    let is_vocabulary = is_embedding(module) || is_head(module);
                    if saved_from.is_none() && !is_bias && !is_vocabulary {
                        let reason = "neither LoRA nor named by bias or modules_to_save".to_owned();
                        return Err(CheckpointError::Unexpected { tensor: name.to_owned(), reason });
                    }
                    let map = if is_wrapped { &mut sorted.wrapped } else { &mut sorted.whole };
                    map.insert(tensor.clone(), name.to_owned()).map(|_| tensor)
                }
                Key::Unused => None,
            };
            if let Some(known) = known {
                return Err(two(name, &known));
            }
        }
        Ok(sorted)
    }
}

fn two(name: &str, tensor: &str) -> CheckpointError {
    let reason = format!("two tensors of the adapter stand for {tensor}, and which one counts nothing says");
    CheckpointError::Unexpected { tensor: name.to_owned(), reason }
}

/// `Ok` if there are any tensors.
pub(super) fn check_any(names: impl IntoIterator) -> Result<(), CheckpointError> {
    if names.into_iter().next().is_some() {
        return Ok(());
    }
    let reason = "there are no tensors: nothing was saved, and there is nothing to merge".to_owned();
    Err(CheckpointError::Unexpected { tensor: "the adapter".to_owned(), reason })
}

/// `Ok` unless a tensor is empty.
fn check_is_whole(source: &dyn TensorSource, name: &str) -> Result<(), CheckpointError> {
    let shape = &info_of(source, name)?.shape;
    if !shape.contains(&0) {
        return Ok(());
    }
    let reason = format!(
        "shape {shape:?}: an empty tensor is what a DeepSpeed ZeRO-3 or FSDP save leaves whose shards were not gathered; \
         save the adapter again with the parameters gathered"
    );
    Err(CheckpointError::Unexpected { tensor: name.to_owned(), reason })
}

fn owned(source: &dyn TensorSource, name: &str) -> Result<TensorData<'static>, CheckpointError> {
    let info = info_of(source, name)?;
    TensorData::new(name, info.dtype, info.shape.clone(), OwnedBytes::Owned(owned_bytes(source, name)?))
}

/// The modules that `modules_to_save` names.
struct Modules<'a> {
    names: BTreeSet<&'a str>,
    /// The lengths of the names.
    lens: BTreeSet<usize>,
}

impl<'a> Modules<'a> {
    fn new(names: &'a [String]) -> Self {
        let names: BTreeSet<&str> = names.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
        let lens = names.iter().map(|name| name.len()).collect();
        Self { names, lens }
    }

    /// Where the name of the outermost of them begins in that of a tensor that it holds, at the start of a part. As in
    /// PEFT (`_set_trainable` in `utils/other.py`) a module is one of them if its name ends so, in the middle of a part
    /// too: `norm` means `input_layernorm` as well.
    fn find(&self, tensor: &str) -> Option<usize> {
        let ends = tensor.match_indices('.').map(|(end, _)| end);
        ends.flat_map(|end| self.lens.range(..=end).map(move |len| (end - len, end))).find_map(|(start, end)| {
            let name = tensor.get(start..end)?;
            let start_of_part = tensor[..start].rfind('.').map_or(0, |dot| dot + 1);
            self.names.contains(name).then_some(start_of_part)
        })
    }
}

/// The adapter of a module that has these tensors.
fn load_module(
    config: &PeftConfig,
    source: &dyn TensorSource,
    module: &str,
    parts: &Parts,
) -> Result<PeftModule, CheckpointError> {
    const MAGNITUDE: &str = "lora_magnitude_vector";
    let is_embedding = parts.keys().any(|part| part.starts_with("lora_embedding_"));
    let [a, b] =
        if is_embedding { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A.weight", "lora_B.weight"] };
    let b_bias = "lora_B.bias";
    if let Some(part) = parts.keys().find(|part| ![a, b, b_bias, MAGNITUDE].contains(&part.as_str())) {
        return Err(CheckpointError::Unsupported { what: tensor_name(module, part), variant: part.clone() });
    }
    let wants_bias = config.lora_bias() && !is_embedding;
    for (part, wanted, reason) in [
        (b_bias, wants_bias, "a bias of lora_B, but lora_bias is false"),
        (MAGNITUDE, config.is_dora(), "a magnitude, but use_dora is false"),
    ] {
        match (wanted, parts.get(part)) {
            (false, Some(name)) => {
                return Err(CheckpointError::Unexpected { tensor: name.clone(), reason: reason.to_owned() });
            }
            (true, None) => return Err(CheckpointError::Missing { tensor: tensor_name(module, part) }),
            _ => {}
        }
    }
    let name = |part: &str| parts.get(part).cloned().unwrap_or_else(|| tensor_name(module, part));
    let rank = config.rank(module);
    let (a_shape, kernel) = matrix(source, &name(a))?;
    let (b_shape, b_kernel) = matrix(source, &name(b))?;
    // B of a convolution has a kernel of ones.
    if b_kernel.iter().any(|dim| *dim != 1) || b_kernel.len() != kernel.len() {
        let (a_shape, b_shape) = (&info_of(source, &name(a))?.shape, &info_of(source, &name(b))?.shape);
        let reason = format!("shape {a_shape:?} does not belong to {} {b_shape:?}", name(b));
        return Err(CheckpointError::Unexpected { tensor: name(a), reason });
    }
    let (d_in, d_out) = (a_shape[1], b_shape[0]);
    let a = read_matrix(source, &name(a), a_shape, [rank, d_in])?;
    let b = read_matrix(source, &name(b), b_shape, [d_out, rank])?;
    let alpha = config.alpha(module);
    let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
    let mut adapter = LoRAAdapter::from_parts(a, b, d_out, d_in, rank, alpha, config.scaling()).map_err(error)?;
    if config.is_dora() {
        adapter = adapter.with_magnitude(vector(source, &name(MAGNITUDE), d_out)?).map_err(error)?;
    }
    let bias = if wants_bias { Some(vector(source, &name(b_bias), d_out)?) } else { None };
    let kind = match (is_embedding, kernel.is_empty()) {
        (true, _) => PeftModuleKind::Embedding,
        (false, true) => PeftModuleKind::Linear,
        (false, false) => PeftModuleKind::Convolution(kernel),
    };
    Ok(PeftModule { adapter, bias, kind })
}

/// The pair of a parameter.
fn load_factors(source: &dyn TensorSource, module: &str, parts: &Parts) -> Result<Factors, CheckpointError> {
    let (a, b) = ("lora_A.weight", "lora_B.weight");
    if let Some(part) = parts.keys().find(|part| ![a, b].contains(&part.as_str())) {
        return Err(CheckpointError::Unsupported { what: tensor_name(module, part), variant: part.clone() });
    }
    let read = |part: &str| {
        let name = parts.get(part).ok_or_else(|| CheckpointError::Missing { tensor: tensor_name(module, part) })?;
        let (shape, kernel) = matrix(source, name)?;
        if !kernel.is_empty() {
            let variant = "a kernel for a parameter".to_owned();
            return Err(CheckpointError::Unsupported { what: name.clone(), variant });
        }
        let values = read_matrix(source, name, shape, shape)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok((values, shape)),
            Some(index) => {
                let reason = format!("value {index} is {}, which is not finite", values[index]);
                Err(CheckpointError::Unexpected { tensor: name.clone(), reason })
            }
        }
    };
    let ((a, a_shape), (b, b_shape)) = (read(a)?, read(b)?);
    if a_shape[0] != b_shape[1] {
        let expected = alloc::vec![b_shape[0], a_shape[0]];
        return Err(CheckpointError::Shape { tensor: parts["lora_B.weight"].clone(), expected, got: b_shape.to_vec() });
    }
    Ok(Factors { a, a_shape, b, b_shape })
}

fn load_tokens(
    targets: &Targets<'_>,
    source: &dyn TensorSource,
    module: &str,
    name: &str,
) -> Result<AdaptedTokens, CheckpointError> {
    let indices = targets.tokens(module)?;
    let (shape, _) = matrix(source, name)?;
    if shape[0] != indices.len() {
        let (expected, got) = (alloc::vec![indices.len(), shape[1]], shape.to_vec());
        return Err(CheckpointError::Shape { tensor: name.to_owned(), expected, got });
    }
    let values = read_matrix(source, name, shape, shape)?;
    Ok(AdaptedTokens { indices: indices.to_vec(), values, width: shape[1] })
}

/// A vector of this length; that of a convolution has dimensions of 1 besides.
fn vector(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
    let shape = &info_of(source, name)?.shape;
    if shape.iter().filter(|dim| **dim != 1).count() > 1 {
        check_shape(source, name, &[len])?;
    }
    let values = read_floats(source, name)?.0;
    if values.len() != len {
        check_shape(source, name, &[len])?;
    }
    Ok(values)
}

/// The shape of a tensor as a matrix, whose columns are all dimensions but the first, and those beyond the second: the
/// kernel of a convolution.
fn matrix(source: &dyn TensorSource, name: &str) -> Result<([usize; 2], Vec<usize>), CheckpointError> {
    let shape = &info_of(source, name)?.shape;
    let overflow = || CheckpointError::Overflow { tensor: name.to_owned(), shape: shape.clone() };
    match &**shape {
        [rows, cols, kernel @ ..] if kernel.len() <= 3 => {
            let cols = kernel.iter().try_fold(*cols, |n, dim| n.checked_mul(*dim)).ok_or_else(overflow)?;
            Ok(([*rows, cols], kernel.to_vec()))
        }
        shape => {
            let variant = format!("an adapter of shape {shape:?}, which is neither a matrix nor a kernel,");
            Err(CheckpointError::Unsupported { what: name.to_owned(), variant })
        }
    }
}

/// The values of a tensor that is a matrix of this shape, which must be the expected one.
fn read_matrix(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
    expected: [usize; 2],
) -> Result<Vec<f32>, CheckpointError> {
    if shape == expected {
        return Ok(read_floats(source, name)?.0);
    }
    let got = info_of(source, name)?.shape.clone();
    Err(CheckpointError::Shape { tensor: name.to_owned(), expected: expected.to_vec(), got })
}
