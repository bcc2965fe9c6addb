//! `adapter_config.json`.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::error::CheckpointError;
use super::super::json::{Object, from_python, shown, to_strings, to_usize};
use super::pattern::{Ordered, Patterns, WORK_LIMIT};
use crate::LoRAScaling;

pub(super) const CONFIG: &str = "adapter_config.json";

/// The modules that an adapter is meant for: the field `target_modules` of a configuration.
///
/// The tensors tell which modules an adapter really has.
#[doc(alias = "target_modules")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Names, or ends of names.
    List(Vec<String>),
    /// A regular expression, or `all-linear`.
    Expression(String),
}

/// Which biases of the base were trained with an adapter: the field `bias` of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BiasTraining {
    /// None.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of the modules with an adapter.
    LoraOnly,
}

impl BiasTraining {
    const NAMES: [(Self, &'static str); 3] = [(Self::None, "none"), (Self::All, "all"), (Self::LoraOnly, "lora_only")];

    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|(_, n)| *n == name).map(|(bias, _)| bias)
    }

    fn name(self) -> &'static str {
        Self::NAMES.into_iter().find(|(bias, _)| *bias == self).map_or("none", |(_, name)| name)
    }
}

/// The configuration of a PEFT adapter, the contents of its `adapter_config.json`: rank, alpha, scaling, target modules and
/// what else PEFT keeps there.
///
/// Fields that change no result (`lora_dropout`, `task_type`, `base_model_name_or_path` and unknown ones) are kept, and
/// written again.
#[doc(alias = "LoraConfig")]
#[derive(Debug, Clone)]
pub struct PeftConfig {
    rank: usize,
    alpha: f64,
    scaling: LoRAScaling,
    rank_pattern: Ordered,
    alpha_pattern: Ordered,
    ranks: Patterns<usize>,
    alphas: Patterns<f64>,
    target_modules: Option<TargetModules>,
    fan_in_fan_out: bool,
    bias: BiasTraining,
    lora_bias: bool,
    dora: bool,
    modules_to_save: Vec<String>,
    target_parameters: Vec<String>,
    trainable_tokens: Vec<(String, Vec<usize>)>,
    ensure_weight_tying: bool,
    fields: Map<String, Value>,
}

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

impl PeftConfig {
    /// A configuration with this rank and alpha for all modules, and PEFT's defaults for the rest.
    #[must_use]
    pub fn new(rank: usize, alpha: f64, scaling: LoRAScaling) -> Self {
        Self {
            rank,
            alpha,
            scaling,
            rank_pattern: Ordered::default(),
            alpha_pattern: Ordered::default(),
            ranks: Patterns::none(),
            alphas: Patterns::none(),
            target_modules: None,
            fan_in_fan_out: false,
            bias: BiasTraining::None,
            lora_bias: false,
            dora: false,
            modules_to_save: Vec::new(),
            target_parameters: Vec::new(),
            trainable_tokens: Vec::new(),
            ensure_weight_tying: false,
            fields: Map::new(),
        }
    }

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

    /// The text of an `adapter_config.json`: the fields that [`Self::parse`] was given and the ones of this value,
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
        super::save::config_text(fields, &self.rank_pattern, &self.alpha_pattern)
    }
}

/// Accessors.
impl PeftConfig {
    /// The rank of a module, by its name without `base_model.model.`.
    #[doc(alias = "rank_pattern")]
    #[must_use]
    pub fn rank(&self, module: &str) -> usize {
        self.ranks.get(module).unwrap_or(self.rank)
    }

    /// The alpha of a module.
    #[doc(alias("lora_alpha", "alpha_pattern"))]
    #[must_use]
    pub fn alpha(&self, module: &str) -> f64 {
        self.alphas.get(module).unwrap_or(self.alpha)
    }

    /// How the scale follows from alpha and rank: the field `use_rslora`.
    #[doc(alias = "use_rslora")]
    #[must_use]
    pub fn scaling(&self) -> LoRAScaling {
        self.scaling
    }

    /// Whether adapters have a magnitude: the field `use_dora`.
    #[doc(alias = "use_dora")]
    #[must_use]
    pub fn is_dora(&self) -> bool {
        self.dora
    }

    /// Whether dense weights of the base are `[in, out]`, as in `Conv1D` of GPT-2. 4-bit weights never are.
    #[must_use]
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// Which biases of the base were trained.
    #[must_use]
    pub fn bias(&self) -> BiasTraining {
        self.bias
    }

    /// Whether `B` has a bias of its own.
    #[must_use]
    pub fn lora_bias(&self) -> bool {
        self.lora_bias
    }

    /// The modules to adapt: the field `target_modules`.
    #[must_use]
    pub fn target_modules(&self) -> Option<&TargetModules> {
        self.target_modules.as_ref()
    }

    /// Modules that were trained as a whole, by name or end of name.
    #[must_use]
    pub fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    /// Parameters that are not weights of layers and have adapters, by name or end of name.
    #[must_use]
    pub fn target_parameters(&self) -> &[String] {
        &self.target_parameters
    }

    /// The tokens whose rows were trained, by the name or end of name of their embedding; an empty name is the input
    /// embedding.
    #[doc(alias = "trainable_token_indices")]
    #[must_use]
    pub fn trainable_tokens(&self) -> &[(String, Vec<usize>)] {
        &self.trainable_tokens
    }

    /// Whether input and output embeddings stay one weight, `ensure_weight_tying`.
    #[must_use]
    pub fn ensures_weight_tying(&self) -> bool {
        self.ensure_weight_tying
    }

    /// `Ok` if the patterns can be matched with these modules in bounded time.
    pub(super) fn check_work<'m>(&self, modules: impl Iterator<Item = &'m str>) -> Result<(), CheckpointError> {
        let (count, letters) = modules.fold((0, 0), |(count, letters), name| (count + 1, letters + name.len()));
        if self.ranks.work(count, letters).saturating_add(self.alphas.work(count, letters)) <= WORK_LIMIT {
            return Ok(());
        }
        Err(CheckpointError::Field {
            what: CONFIG.to_owned(),
            field: "rank_pattern and alpha_pattern".to_owned(),
            expected: "expressions that can be matched with all modules in a few seconds",
            got: format!("too many, or too large ones, for {count} modules"),
        })
    }

    /// All fields, including those that this library ignores.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }
}

/// Changes.
impl PeftConfig {
    pub(super) fn with_target_modules(self, modules: TargetModules) -> Self {
        Self { target_modules: Some(modules), ..self }
    }

    /// Sets a field that this library ignores, such as `task_type` or `base_model_name_or_path`. For other fields, this has no
    /// effect on what is written.
    #[must_use]
    pub fn with_field(mut self, field: &str, value: Value) -> Self {
        self.fields.insert(field.to_owned(), value);
        self
    }

    pub(super) fn with_dora(self, dora: bool) -> Self {
        Self { dora, ..self }
    }

    /// Adds patterns for one module.
    pub(super) fn set_module(&mut self, module: &str, rank: usize, alpha: f64) {
        let key = super::pattern::exactly(module);
        if rank != self.rank {
            self.rank_pattern.0.push((key.clone(), rank.into()));
        }
        if alpha != self.alpha {
            self.alpha_pattern.0.push((key, number(alpha)));
        }
    }

    /// Compiles the patterns that [`Self::set_module`] added.
    pub(super) fn compiled(mut self) -> Result<Self, CheckpointError> {
        self.ranks = Patterns::compile("rank_pattern", &self.rank_pattern, "a rank of at least 1", to_rank)?;
        self.alphas = Patterns::compile("alpha_pattern", &self.alpha_pattern, "a finite number", to_alpha)?;
        Ok(self)
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

fn to_rank(value: &Value) -> Option<usize> {
    to_usize(value).filter(|rank| *rank > 0)
}

fn to_alpha(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite())
}

/// A number as PEFT has it: an integer if it is one.
fn number(x: f64) -> Value {
    /// 2^53: up to here every integer is an f64.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    #[allow(clippy::cast_possible_truncation, reason = "the guard makes it exact")]
    if x.abs() < EXACT && (x as i64) as f64 == x { (x as i64).into() } else { x.into() }
}
