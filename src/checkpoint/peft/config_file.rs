//! Reading and writing `adapter_config.json`.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Deserialize;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

use super::super::error::CheckpointError;
use super::super::json::{Object, from_python, shown, to_python, to_strings, to_usize};
use super::CONFIG;
use super::config::{BiasTraining, PeftConfig, TargetModules, number, to_alpha, to_rank};
use super::pattern::{Ordered, Patterns};
use crate::LoRAScaling;

/// The fields whose order counts.
#[derive(Deserialize)]
struct InOrder {
    #[serde(default)]
    rank_pattern: Ordered,
    #[serde(default)]
    alpha_pattern: Ordered,
}

/// Variants that change what an adapter computes, or what base it belongs to, and that are off if null (or false, or
/// empty).
const VARIANTS: [&str; 10] = [
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "enable_lora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
];

/// Initialisations that leave the base as it is; all others (`pissa`, `olora`, `corda`, `loftq`, `lora_ga`) subtract
/// something from it, and the adapter is right only on a base so changed.
const PLAIN_INITIALISATIONS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The file.
impl PeftConfig {
    /// Parses the text of an `adapter_config.json`.
    ///
    /// # Errors
    /// [`CheckpointError::Json`]; [`CheckpointError::Field`]; [`CheckpointError::Unsupported`] with the name of a
    /// variant that is not implemented: a `peft_type` other than `LORA`, `use_qalora`, an initialisation that
    /// changes the base, and so on.
    pub fn parse(json: &[u8]) -> Result<Self, CheckpointError> {
        let json = &*from_python(json);
        let object = Object::parse(CONFIG, json)?;
        let unsupported = |variant| CheckpointError::Unsupported { what: CONFIG.to_owned(), variant };
        match object.optional("peft_type", "a string", "LORA", Value::as_str)? {
            "LORA" => {}
            other => return Err(unsupported(format!("peft_type {other:?}"))),
        }
        for field in VARIANTS {
            if let Some(value) = object.get(field).filter(|value| is_on(value)) {
                return Err(unsupported(format!("{field} = {}", shown(value))));
            }
        }
        if let Some(value) = object.get("init_lora_weights")
            && !value.is_boolean()
            && !value.as_str().is_some_and(|v| PLAIN_INITIALISATIONS.contains(&v.to_lowercase().as_str()))
        {
            let reason = "which changes the base, so that the adapter is right on that alone; PEFT converts it \
                          (save_pretrained with path_initial_model_for_weight_conversion); as it is, it";
            return Err(unsupported(format!("init_lora_weights = {}, {reason}", shown(value))));
        }
        let in_order: InOrder = serde_json::from_slice(json)
            .map_err(|e| CheckpointError::Json { what: CONFIG.to_owned(), reason: e.to_string() })?;
        let InOrder { rank_pattern, alpha_pattern } = in_order;
        let flag = |field| object.optional(field, "true or false", false, Value::as_bool);
        let config = Self {
            rank: object.optional("r", "a rank of at least 1", 8, to_rank)?,
            alpha: object.optional("lora_alpha", "a finite number", 8.0, to_alpha)?,
            scaling: if flag("use_rslora")? { LoRAScaling::RsLoRA } else { LoRAScaling::Standard },
            ranks: Patterns::compile("rank_pattern", &rank_pattern, "a rank of at least 1", to_rank)?,
            alphas: Patterns::compile("alpha_pattern", &alpha_pattern, "a finite number", to_alpha)?,
            rank_pattern,
            alpha_pattern,
            target_modules: object.optional("target_modules", "a list of names or a string", None, |v| {
                let text = v.as_str().map(|text| TargetModules::Expression(text.to_owned()));
                text.or_else(|| to_strings(v).map(TargetModules::List)).map(Some)
            })?,
            fan_in_fan_out: flag("fan_in_fan_out")?,
            bias: object.optional("bias", "none, all or lora_only", BiasTraining::None, |v| {
                BiasTraining::from_name(v.as_str()?)
            })?,
            lora_bias: flag("lora_bias")?,
            dora: flag("use_dora")?,
            modules_to_save: object.optional("modules_to_save", "a list of names", Vec::new(), to_strings)?,
            target_parameters: object.optional("target_parameters", "a list of names", Vec::new(), to_strings)?,
            trainable_tokens: object.optional(
                "trainable_token_indices",
                "a list of tokens, or such lists by module",
                Vec::new(),
                to_tokens,
            )?,
            ensure_weight_tying: flag("ensure_weight_tying")?,
            fields: object.into_fields(),
        };
        // As in LoraConfig.__post_init__.
        if config.dora && config.lora_bias {
            return Err(unsupported("lora_bias with use_dora".to_owned()));
        }
        Ok(config)
    }

    /// The text of an `adapter_config.json`: the fields that [`Self::parse`] was given and those of this value,
    /// sorted and indented as PEFT writes them; patterns in their order.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut fields = self.fields.clone();
        let mut set = |field: &str, value: Value| fields.insert(field.to_owned(), value);
        set("peft_type", "LORA".into());
        set("r", self.rank.into());
        set("lora_alpha", number(self.alpha));
        set("use_rslora", (self.scaling == LoRAScaling::RsLoRA).into());
        set("use_dora", self.dora.into());
        set("fan_in_fan_out", self.fan_in_fan_out.into());
        set("bias", self.bias.name().into());
        set("lora_bias", self.lora_bias.into());
        set(
            "target_modules",
            match &self.target_modules {
                None => Value::Null,
                Some(TargetModules::List(names)) => names.clone().into(),
                Some(TargetModules::Expression(text)) => text.clone().into(),
            },
        );
        set(
            "modules_to_save",
            match &*self.modules_to_save {
                [] => Value::Null,
                names => names.into(),
            },
        );
        for (field, default) in [("task_type", Value::Null), ("base_model_name_or_path", Value::Null)] {
            fields.entry(field).or_insert(default);
        }
        fields.entry("inference_mode").or_insert(true.into());
        config_text(fields, &self.rank_pattern, &self.alpha_pattern)
    }
}

/// Whether a variant is in use.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// A list of tokens, or an object of such lists.
fn to_tokens(value: &Value) -> Option<Vec<(String, Vec<usize>)>> {
    let list = |value: &Value| value.as_array()?.iter().map(to_usize).collect::<Option<Vec<usize>>>();
    match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| Some((name.clone(), list(value)?))).collect(),
        Value::Array(items) if items.is_empty() => Some(Vec::new()),
        value => Some(alloc::vec![(String::new(), list(value)?)]),
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
fn config_text(mut fields: Map<String, Value>, rank_pattern: &Ordered, alpha_pattern: &Ordered) -> String {
    for name in ["rank_pattern", "alpha_pattern"] {
        fields.insert(name.to_owned(), Value::Null);
    }
    let fields = Fields { fields: &fields, rank_pattern, alpha_pattern };
    to_python(serde_json::to_string_pretty(&fields).expect("every key is a string, and the writer is a vector"))
}
