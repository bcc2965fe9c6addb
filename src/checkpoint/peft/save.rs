//! Writing an adapter.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde_json::Value;

use super::super::error::CheckpointError;
use super::super::float::FloatType;
use super::super::source::{TensorData, TensorMap};
use super::super::write::to_safetensors;
use super::adapter::{PeftAdapter, PeftModule, PeftModuleKind, tensor_name};
use super::config::{PeftConfig, TargetModules};
use super::load::check_any;
use crate::{LoRAAdapter, LoRAScaling};

/// Making.
impl PeftAdapter {
    /// An adapter for these modules, by their names in the base model. Rank and alpha of the first one become those of the
    /// configuration, and modules with others get patterns. The target modules are exactly these names.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] if some have `rsLoRA` scaling or `DoRA` and others not, which PEFT cannot say;
    /// [`CheckpointError::Layer`] if `A` or `B` of one was replaced by a tensor of another length.
    pub fn new(modules: impl IntoIterator<Item = (String, LoRAAdapter)>) -> Result<Self, CheckpointError> {
        let modules: Vec<(String, LoRAAdapter)> = modules.into_iter().collect();
        let mut config = match modules.first() {
            None => PeftConfig::new(8, 8.0, LoRAScaling::Standard),
            Some((_, first)) => {
                PeftConfig::new(first.rank(), first.alpha(), first.scaling()).with_dora(first.is_dora())
            }
        };
        for (name, adapter) in &modules {
            let mixed =
                |variant: &str| CheckpointError::Unsupported { what: name.clone(), variant: variant.to_owned() };
            if adapter.scaling() != config.scaling() {
                return Err(mixed("rsLoRA for some modules only"));
            }
            if adapter.is_dora() != config.is_dora() {
                return Err(mixed("DoRA for some modules only"));
            }
            adapter.pair().map_err(|error| CheckpointError::Layer { layer: name.clone(), error })?;
            config.set_module(name, adapter.rank(), adapter.alpha());
        }
        let names = modules.iter().map(|(name, _)| name.clone()).collect();
        let config = config.compiled()?.with_target_modules(TargetModules::List(names));
        let kind = PeftModuleKind::Linear;
        let module = |(name, adapter)| (name, PeftModule { adapter, bias: None, kind: kind.clone() });
        Ok(Self {
            config,
            modules: modules.into_iter().map(module).collect(),
            parameters: BTreeMap::new(),
            tokens: BTreeMap::new(),
            replaced: TensorMap::new(),
            bases: TensorMap::new(),
            saved: BTreeMap::new(),
        })
    }

    /// Sets a field of the configuration that this library ignores; see [`PeftConfig::with_field`].
    #[must_use]
    pub fn with_field(self, field: &str, value: Value) -> Self {
        Self { config: self.config.with_field(field, value), ..self }
    }

    /// Sets the target modules of the configuration.
    #[must_use]
    pub fn with_target_modules(self, modules: TargetModules) -> Self {
        Self { config: self.config.with_target_modules(modules), ..self }
    }

    /// Replaces the adapter of a module by a trained one.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] if there is no such module; [`CheckpointError::Unsupported`] if shape, rank, alpha,
    /// scaling or `DoRA` are not those of the one that was there, which the configuration describes;
    /// [`CheckpointError::Layer`] if `A` or `B` was replaced by a tensor of another length.
    pub fn replace(&mut self, module: &str, adapter: LoRAAdapter) -> Result<(), CheckpointError> {
        adapter.pair().map_err(|error| CheckpointError::Layer { layer: module.to_owned(), error })?;
        let missing = || CheckpointError::Missing { tensor: tensor_name(module, "lora_A.weight") };
        let old = self.modules.get_mut(module).ok_or_else(missing)?;
        let parts = |a: &LoRAAdapter| (a.d_out(), a.d_in(), a.rank(), a.alpha().to_bits(), a.scaling(), a.is_dora());
        if parts(&adapter) != parts(&old.adapter) {
            let variant = "another shape, rank, alpha, scaling or DoRA than the module had".to_owned();
            return Err(CheckpointError::Unsupported { what: module.to_owned(), variant });
        }
        old.adapter = adapter;
        Ok(())
    }
}

/// Writing.
impl PeftAdapter {
    /// The tensors of `adapter_model.safetensors`, adapters in the type `float`, each value rounded once; what replaces
    /// tensors of the base keeps its type.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] for a `DoRA` adapter that never met a base and so has no magnitude yet;
    /// [`CheckpointError::Layer`] if `A` or `B` was replaced by a tensor of another length;
    /// [`CheckpointError::Unexpected`] for what [`Self::load`] refuses too: an empty tensor, and no tensors at all.
    pub fn tensors(&self, float: FloatType) -> Result<TensorMap<'_>, CheckpointError> {
        let mut tensors = TensorMap::new();
        for (name, module) in &self.modules {
            let adapter = &module.adapter;
            adapter.pair().map_err(|error| CheckpointError::Layer { layer: name.clone(), error })?;
            let matrix = |values: &[f32], shape| TensorData::floats(values, float).with_shape(shape);
            let mut add = |part: &str, tensor| tensors.insert(tensor_name(name, part), tensor);
            let (d_out, d_in, rank) = (adapter.d_out(), adapter.d_in(), adapter.rank());
            let (a_part, b_part, a_shape, b_shape) = match &module.kind {
                PeftModuleKind::Linear => {
                    ("lora_A.weight", "lora_B.weight", alloc::vec![rank, d_in], alloc::vec![d_out, rank])
                }
                PeftModuleKind::Embedding => {
                    ("lora_embedding_A", "lora_embedding_B", alloc::vec![rank, d_in], alloc::vec![d_out, rank])
                }
                PeftModuleKind::Convolution(kernel) => {
                    let inner = d_in / kernel.iter().product::<usize>().max(1);
                    let a = [rank, inner].into_iter().chain(kernel.iter().copied()).collect();
                    let b = [d_out, rank].into_iter().chain(kernel.iter().map(|_| 1)).collect();
                    ("lora_A.weight", "lora_B.weight", a, b)
                }
            };
            add(a_part, matrix(adapter.a().data(), a_shape));
            add(b_part, matrix(adapter.b().data(), b_shape));
            if let Some(bias) = &module.bias {
                add("lora_B.bias", TensorData::floats(bias, float));
            }
            if adapter.is_dora() {
                const PART: &str = "lora_magnitude_vector";
                let missing = || CheckpointError::Missing { tensor: tensor_name(name, PART) };
                let magnitude = adapter.magnitude().ok_or_else(missing)?.data();
                let shape = match &module.kind {
                    PeftModuleKind::Convolution(kernel) => {
                        [1, d_out].into_iter().chain(kernel.iter().map(|_| 1)).collect()
                    }
                    _ => alloc::vec![d_out],
                };
                add(PART, TensorData::floats(magnitude, float).with_shape(shape));
            }
        }
        for (name, factors) in &self.parameters {
            for (depth, pair) in factors.iter().enumerate() {
                for (part, values, shape) in [("A", &pair.a, pair.a_shape), ("B", &pair.b, pair.b_shape)] {
                    let part = alloc::format!("{}lora_{part}.weight", "base_layer.".repeat(depth));
                    let tensor = TensorData::floats(values, float).with_shape(shape.to_vec());
                    tensors.insert(tensor_name(name, &part), tensor);
                }
            }
        }
        for (name, tokens) in &self.tokens {
            let shape = alloc::vec![tokens.indices.len(), tokens.width];
            let tensor = TensorData::floats(&tokens.values, float).with_shape(shape);
            tensors.insert(tensor_name(name, "token_adapter.trainable_tokens_delta"), tensor);
        }
        for (name, tensor) in &self.replaced {
            let name = match name.rsplit_once('.') {
                Some((module, "bias")) if self.modules.contains_key(module) => tensor_name(module, "base_layer.bias"),
                _ => alloc::format!("{}{name}", super::PREFIX),
            };
            tensors.insert(name, tensor.borrowed());
        }
        for (name, tensor) in &self.bases {
            let (module, part) = name.rsplit_once('.').unwrap_or(("", name));
            let between = if self.modules.contains_key(module) {
                "base_layer"
            } else if self.tokens.contains_key(module) {
                "token_adapter.base_layer"
            } else {
                "original_module"
            };
            tensors.insert(tensor_name(module, &alloc::format!("{between}.{part}")), tensor.borrowed());
        }
        check_any(tensors.keys())?;
        if let Some((name, tensor)) = tensors.iter().find(|(_, tensor)| tensor.shape().contains(&0)) {
            let reason = alloc::format!("shape {:?}: an empty tensor would not be loaded again", tensor.shape());
            return Err(CheckpointError::Unexpected { tensor: name.clone(), reason });
        }
        Ok(tensors)
    }

    /// Both files of an adapter: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] for a `DoRA` adapter that never met a base and so has no magnitude yet;
    /// [`CheckpointError::Layer`] if `A` or `B` was replaced by a tensor of another length;
    /// [`CheckpointError::Unexpected`] for an empty tensor, for no tensors at all, and for a name that safetensors does not
    /// allow; [`CheckpointError::Memory`].
    #[doc(alias = "save_pretrained")]
    pub fn to_files(&self, float: FloatType) -> Result<(String, Vec<u8>), CheckpointError> {
        Ok((self.config.to_json(), to_safetensors(&self.tensors(float)?)?))
    }
}
