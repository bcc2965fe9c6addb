//! An adapter: its configuration, the low-rank pair of each module, and what else was trained.

use alloc::borrow::{Cow, ToOwned};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::float::read_floats;
use super::super::source::{bytes_of, check_shape, info_of};
use super::super::{CheckpointError, Linear4bit, TensorData, TensorMap, TensorSource};
use super::PREFIX;
use super::config::{BiasTraining, PeftConfig};
use crate::{LoRAAdapter, QLoRALayer};

/// The adapter of one module.
#[derive(Debug, Clone)]
pub struct PeftModule {
    pub(super) adapter: LoRAAdapter,
    pub(super) bias: Option<Vec<f32>>,
}

impl PeftModule {
    /// `A`, `B`, the scale, and the magnitude of `DoRA` if there is one.
    #[must_use]
    pub fn adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// The bias of `B`, `[out]`, which counts `scale` times, as `B` does; there is one with `lora_bias`.
    #[must_use]
    pub fn lora_bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// `bias + scale * lora_bias`, or `None` if there is neither.
    pub(in super::super) fn add_to_bias(&self, bias: Option<Vec<f32>>) -> Option<Vec<f32>> {
        let Some(added) = &self.bias else { return bias };
        let mut bias = bias.unwrap_or_else(|| alloc::vec![0.0; added.len()]);
        bias.iter_mut().zip(added).for_each(|(b, a)| *b += self.adapter.scale() * a);
        Some(bias)
    }
}

/// A PEFT adapter for a model.
#[derive(Debug, Clone)]
pub struct PeftAdapter {
    pub(super) config: PeftConfig,
    pub(super) modules: BTreeMap<String, PeftModule>,
    pub(super) replaced: TensorMap<'static>,
}

/// Reading.
impl PeftAdapter {
    /// Reads an adapter from the text of its `adapter_config.json` and the tensors of its `adapter_model.safetensors`.
    ///
    /// # Errors
    /// Those of [`PeftConfig::parse`]. For the tensors: [`CheckpointError::Missing`] if one of a pair is not there;
    /// [`CheckpointError::Shape`] if one does not fit the rank or the other one; [`CheckpointError::Type`];
    /// [`CheckpointError::Unsupported`] for tensors of a variant that is not implemented;
    /// [`CheckpointError::Unexpected`] for tensors that nothing in the configuration explains;
    /// [`CheckpointError::Layer`] for NaN and infinity.
    pub fn load(config: &[u8], source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        let config = PeftConfig::parse(config)?;
        let mut modules: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut replaced = TensorMap::new();
        for name in source.names() {
            let unexpected = |reason| CheckpointError::Unexpected { tensor: name.to_owned(), reason };
            let inner = name
                .strip_prefix(PREFIX)
                .ok_or_else(|| unexpected("the name does not start with base_model.model."))?;
            if let Some((module, _)) = inner.split_once(".lora_") {
                modules.entry(module).or_default().push(&inner[module.len() + 1..]);
                continue;
            }
            if !is_replacement(&config, inner) {
                return Err(unexpected("neither LoRA nor named by bias or modules_to_save"));
            }
            let info = info_of(source, name)?;
            let bytes = Cow::<'static, [u8]>::Owned(bytes_of(source, name)?.into_owned());
            let tensor = TensorData::new(name, info.dtype, info.shape.clone(), bytes)?;
            replaced.insert(inner.replace(".base_layer.", "."), tensor);
        }
        let modules = modules.into_iter().map(|(module, parts)| {
            let loaded = load_module(&config, source, module, &parts)?;
            Ok((module.to_owned(), loaded))
        });
        Ok(Self { modules: modules.collect::<Result<_, _>>()?, config, replaced })
    }
}

/// What it has.
impl PeftAdapter {
    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The modules with an adapter, by their names in the base model (`model.layers.0.self_attn.q_proj`).
    pub fn modules(&self) -> impl Iterator<Item = (&str, &PeftModule)> {
        self.modules.iter().map(|(name, module)| (name.as_str(), module))
    }

    /// The adapter of a module.
    #[must_use]
    pub fn module(&self, name: &str) -> Option<&PeftModule> {
        self.modules.get(name)
    }

    /// Tensors of the base model that were trained as a whole (`modules_to_save`, biases, resized embeddings), by their
    /// names in the base model, whose tensors they replace.
    #[must_use]
    pub fn replaced(&self) -> &TensorMap<'static> {
        &self.replaced
    }

    /// The layer `module` of a model: the 4-bit base with this adapter, and with the bias that the adapter has for it.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] if the adapter has nothing for this module; [`CheckpointError::Layer`] if it was
    /// made for a weight of another shape.
    pub fn layer(&self, module: &str, base: Linear4bit) -> Result<QLoRALayer, CheckpointError> {
        let found = self.modules.get(module);
        let found = found.ok_or_else(|| CheckpointError::Missing { tensor: tensor_name(module, "lora_A.weight") })?;
        let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
        let (weight, bias) = base.into_parts();
        let bias = found.add_to_bias(self.trained_bias(module)?.or(bias));
        let layer = QLoRALayer::from_parts(weight, found.adapter.clone()).map_err(error)?;
        match bias {
            Some(bias) => layer.with_bias(bias).map_err(error),
            None => Ok(layer),
        }
    }

    /// The bias of the base that was trained with the adapter.
    pub(in super::super) fn trained_bias(&self, module: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        let name = format!("{module}.bias");
        if self.replaced.contains_key(&name) { Ok(Some(read_floats(&self.replaced, &name)?.0)) } else { Ok(None) }
    }

    /// Adds the adapter of `module` to a dense weight of the base, row-major `shape`: `weight + scale * B A`, rounded
    /// once to f32, and with a magnitude the `DoRA` weight. `shape` is `[out, in]`, or `[in, out]` with
    /// [`PeftConfig::fan_in_fan_out`].
    ///
    /// # Errors
    /// As [`Self::layer`].
    pub fn merge_dense(&self, module: &str, weight: &mut [f32], shape: [usize; 2]) -> Result<(), CheckpointError> {
        let found = self.modules.get(module);
        let found = found.ok_or_else(|| CheckpointError::Missing { tensor: tensor_name(module, "lora_A.weight") })?;
        let adapter = &found.adapter;
        let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
        let transposed = self.config.fan_in_fan_out();
        let base = if transposed { [shape[1], shape[0]] } else { shape };
        if base != [adapter.d_out(), adapter.d_in()] {
            return Err(error(crate::Error::Mismatch { base, adapter: [adapter.d_out(), adapter.d_in()] }));
        }
        crate::error::check_matrix("base weight", weight, shape[0], shape[1]).map_err(error)?;
        let [d_out, d_in] = base;
        let pair = adapter.pair().map_err(error)?;
        let mut row = crate::buffer::zeros(1, d_in).map_err(error)?;
        // Where element `i` of row `r` is.
        let place = |r: usize, i: usize| if transposed { i * d_out + r } else { r * d_in + i };
        for r in 0..d_out {
            row.iter_mut().enumerate().for_each(|(i, w)| *w = weight[place(r, i)]);
            pair.merge_row(r, &mut row);
            row.iter().enumerate().for_each(|(i, w)| weight[place(r, i)] = *w);
        }
        Ok(())
    }
}

/// The name of a tensor in `adapter_model.safetensors`.
pub(super) fn tensor_name(module: &str, part: &str) -> String {
    format!("{PREFIX}{module}.{part}")
}

/// Whether a tensor that is not of `LoRA` may be in the file: it then replaces one of the base model.
fn is_replacement(config: &PeftConfig, name: &str) -> bool {
    /// PEFT saves these of its own accord if the vocabulary was resized (`EMBEDDING_LAYER_NAMES` in
    /// `utils/constants.py`).
    const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];
    let dotted = format!(".{name}");
    let is_part_of = |module: &str| dotted.contains(&format!(".{module}."));
    (config.bias() != BiasTraining::None && name.ends_with(".bias"))
        || config.modules_to_save().iter().any(|module| is_part_of(module))
        || EMBEDDINGS.iter().any(|module| is_part_of(module))
}

/// The adapter of a module that has tensors with these ends of names.
fn load_module(
    config: &PeftConfig,
    source: &dyn TensorSource,
    module: &str,
    parts: &[&str],
) -> Result<PeftModule, CheckpointError> {
    let name = |part: &str| tensor_name(module, part);
    // Before PEFT 0.11 the magnitude was a parameter of a module of its own.
    let magnitude = ["lora_magnitude_vector", "lora_magnitude_vector.weight"].into_iter().find(|p| parts.contains(p));
    let (a, b, b_bias) = ("lora_A.weight", "lora_B.weight", "lora_B.bias");
    if let Some(part) = parts.iter().find(|p| ![a, b, b_bias].contains(p) && magnitude != Some(p)) {
        return Err(CheckpointError::Unsupported { what: format!("{PREFIX}{module}"), variant: (*part).to_owned() });
    }
    for (part, wanted, field) in [
        (b_bias, config.lora_bias(), "a bias of lora_B, but lora_bias is false"),
        (magnitude.unwrap_or("lora_magnitude_vector"), config.is_dora(), "a magnitude, but use_dora is false"),
    ] {
        match (wanted, parts.contains(&part)) {
            (false, true) => return Err(CheckpointError::Unexpected { tensor: name(part), reason: field }),
            (true, false) => return Err(CheckpointError::Missing { tensor: name(part) }),
            _ => {}
        }
    }
    let rank = config.rank(module);
    let d_in = matrix(source, &name(a))?[1];
    let d_out = matrix(source, &name(b))?[0];
    let a = read_matrix(source, &name(a), [rank, d_in])?;
    let b = read_matrix(source, &name(b), [d_out, rank])?;
    let alpha = config.alpha(module);
    let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
    let mut adapter = LoRAAdapter::from_parts(a, b, d_out, d_in, rank, alpha, config.scaling()).map_err(error)?;
    let vector = |part: &str| {
        check_shape(source, &name(part), &[d_out])?;
        Ok(read_floats(source, &name(part))?.0)
    };
    if let Some(part) = magnitude {
        adapter = adapter.with_magnitude(vector(part)?).map_err(error)?;
    }
    let bias = if config.lora_bias() { Some(vector(b_bias)?) } else { None };
    Ok(PeftModule { adapter, bias })
}

/// The shape of a tensor that must be a matrix: adapters of convolutions are not.
fn matrix(source: &dyn TensorSource, name: &str) -> Result<[usize; 2], CheckpointError> {
    match *info_of(source, name)?.shape {
        [rows, cols] => Ok([rows, cols]),
        ref shape => {
            let variant = format!("an adapter of shape {shape:?}, which is not a matrix,");
            Err(CheckpointError::Unsupported { what: name.to_owned(), variant })
        }
    }
}

fn read_matrix(source: &dyn TensorSource, name: &str, expected: [usize; 2]) -> Result<Vec<f32>, CheckpointError> {
    check_shape(source, name, &expected)?;
    Ok(read_floats(source, name)?.0)
}
