//! `adapter_config.json`.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde_json::{Map, Value};

use super::super::error::CheckpointError;
use super::super::json::to_usize;
use super::CONFIG;
use super::pattern::{Ordered, Patterns, WORK_LIMIT};
use crate::LoRAScaling;

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

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|(_, n)| *n == name).map(|(bias, _)| bias)
    }

    pub(super) fn name(self) -> &'static str {
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
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) scaling: LoRAScaling,
    pub(super) rank_pattern: Ordered,
    pub(super) alpha_pattern: Ordered,
    pub(super) ranks: Patterns<usize>,
    pub(super) alphas: Patterns<f64>,
    pub(super) target_modules: Option<TargetModules>,
    pub(super) fan_in_fan_out: bool,
    pub(super) bias: BiasTraining,
    pub(super) lora_bias: bool,
    pub(super) dora: bool,
    pub(super) modules_to_save: Vec<String>,
    pub(super) target_parameters: Vec<String>,
    pub(super) trainable_tokens: Vec<(String, Vec<usize>)>,
    pub(super) ensure_weight_tying: bool,
    pub(super) fields: Map<String, Value>,
}

/// Construction.
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

pub(super) fn to_rank(value: &Value) -> Option<usize> {
    to_usize(value).filter(|rank| *rank > 0)
}

pub(super) fn to_alpha(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite())
}

/// A number as PEFT has it: an integer if it is one.
pub(super) fn number(x: f64) -> Value {
    /// 2^53: up to here every integer is an f64.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    #[allow(clippy::cast_possible_truncation, reason = "the guard makes it exact")]
    if x.abs() < EXACT && (x as i64) as f64 == x { (x as i64).into() } else { x.into() }
}
