//! Writing an adapter.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

use super::super::source::TensorData;
use super::super::{CheckpointError, FloatType, TensorMap, to_safetensors};
use super::adapter::{PeftAdapter, PeftModule, tensor_name};
use super::config::{PeftConfig, TargetModules};
use super::pattern::Ordered;
use crate::{LoRAAdapter, LoRAScaling};

/// Making.
impl PeftAdapter {
    /// An adapter of these modules, by their names in the base model. The first one's rank and alpha become those of
    /// the configuration; modules with others get patterns. The target modules are these very names.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] if some have `rsLoRA` scaling or `DoRA` and others not, which PEFT cannot say.
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
            config.set_module(name, adapter.rank(), adapter.alpha());
        }
        let names = modules.iter().map(|(name, _)| name.clone()).collect();
        let config = config.compiled()?.with_target_modules(TargetModules::List(names));
        let module = |(name, adapter)| (name, PeftModule { adapter, bias: None });
        Ok(Self { config, modules: modules.into_iter().map(module).collect(), replaced: TensorMap::new() })
    }

    /// The same adapter with another value of a field that this library does nothing with; see
    /// [`PeftConfig::with_field`].
    #[must_use]
    pub fn with_field(self, field: &str, value: Value) -> Self {
        Self { config: self.config.with_field(field, value), ..self }
    }

    /// The same adapter for other target modules, as PEFT is to be told.
    #[must_use]
    pub fn with_target_modules(self, modules: TargetModules) -> Self {
        Self { config: self.config.with_target_modules(modules), ..self }
    }

    /// Replaces the adapter of a module by a trained one.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] if there is no such module; [`CheckpointError::Unsupported`] if shape, rank, alpha,
    /// scaling or `DoRA` are not those of the one that was there, which the configuration describes.
    pub fn replace(&mut self, module: &str, adapter: LoRAAdapter) -> Result<(), CheckpointError> {
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
    /// [`CheckpointError::Layer`] if `A` or `B` was replaced by a tensor of another length.
    pub fn tensors(&self, float: FloatType) -> Result<TensorMap<'_>, CheckpointError> {
        let mut tensors = TensorMap::new();
        for (name, module) in &self.modules {
            let adapter = &module.adapter;
            adapter.pair().map_err(|error| CheckpointError::Layer { layer: name.clone(), error })?;
            let matrix = |values: &[f32], shape| TensorData::floats(values, float).with_shape(shape);
            let mut add = |part: &str, tensor| tensors.insert(tensor_name(name, part), tensor);
            add("lora_A.weight", matrix(adapter.a().data(), alloc::vec![adapter.rank(), adapter.d_in()]));
            add("lora_B.weight", matrix(adapter.b().data(), alloc::vec![adapter.d_out(), adapter.rank()]));
            if let Some(bias) = &module.bias {
                add("lora_B.bias", TensorData::floats(bias, float));
            }
            if adapter.is_dora() {
                const PART: &str = "lora_magnitude_vector";
                let missing = || CheckpointError::Missing { tensor: tensor_name(name, PART) };
                add(PART, TensorData::floats(adapter.magnitude().ok_or_else(missing)?.data(), float));
            }
        }
        for (name, tensor) in &self.replaced {
            tensors.insert(self.replaced_name(name), tensor.borrowed());
        }
        Ok(tensors)
    }

    /// Both files of an adapter: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// Those of [`Self::tensors`] and [`to_safetensors`].
    pub fn to_files(&self, float: FloatType) -> Result<(String, Vec<u8>), CheckpointError> {
        Ok((self.config.to_json(), to_safetensors(&self.tensors(float)?)?))
    }

    /// The name in the adapter of a tensor of the base: that of a module with an adapter is in its `base_layer`.
    fn replaced_name(&self, name: &str) -> String {
        match name.rsplit_once('.') {
            Some((module, part)) if self.modules.contains_key(module) => {
                tensor_name(module, &alloc::format!("base_layer.{part}"))
            }
            _ => alloc::format!("{}{name}", super::PREFIX),
        }
    }
}

/// Fields sorted by name, with the two patterns in the order that counts.
struct Fields<'a> {
    fields: &'a Map<String, Value>,
    rank_pattern: &'a Ordered,
    alpha_pattern: &'a Ordered,
}

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.fields.len()))?;
        for (name, value) in self.fields {
            match name.as_str() {
                "rank_pattern" => map.serialize_entry(name, self.rank_pattern)?,
                "alpha_pattern" => map.serialize_entry(name, self.alpha_pattern)?,
                _ => map.serialize_entry(name, value)?,
            }
        }
        map.end()
    }
}

/// The text of `adapter_config.json`, as `json.dumps(indent=2, sort_keys=True)` lays it out.
pub(super) fn config_text(mut fields: Map<String, Value>, rank_pattern: &Ordered, alpha_pattern: &Ordered) -> String {
    for name in ["rank_pattern", "alpha_pattern"] {
        fields.insert(name.to_owned(), Value::Null);
    }
    let fields = Fields { fields: &fields, rank_pattern, alpha_pattern };
    serde_json::to_string_pretty(&fields).expect("every key is a string, and the writer is a vector")
}
