//! `config.json`: what kind of decoder a checkpoint is, and how large.
//!
//! The fields and their defaults are those of transformers (5.23, `models/*/configuration_*.py`). Every field is either
//! used, known to change nothing that is computed here, or an error that names it: a model that is not understood does
//! not run.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use nf4::checkpoint::QuantizationConfig;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::rope::Rope;

/// The families of models. They differ in their defaults, in biases and in the norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3, `SmolLM2` and what else calls itself `llama`.
    Llama,
    /// Mistral 7B and its kin.
    Mistral,
    /// Qwen2 and Qwen2.5: biases of q, k and v.
    Qwen2,
    /// Qwen3: norms of queries and keys.
    Qwen3,
}

impl Family {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The name in the field `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// The sizes and variants of a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside of the feed-forward block.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// What is added to the mean square in a norm.
    pub norm_eps: f32,
    /// The rotary position embedding.
    pub rope: Rope,
    /// The largest number of positions for which the model was made and for which attention is not windowed.
    pub positions: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys are normed, each head by itself.
    pub qk_norm: bool,
    /// The tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// How the checkpoint was quantized; `None` if it was not.
    pub quantization: Option<QuantizationConfig>,
}

/// Fields that change nothing which is computed here: names, types of files, training, generation, and other libraries.
const IGNORED: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "dtype",
    "embd_pdrop",
    "hidden_dropout",
    "initializer_range",
    "is_llama_config",   // SmolLM2: no field of transformers
    "max_window_layers", // counts only with use_sliding_window
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",      // the same product, cut
    "quantization_config", // read by itself
    "resid_pdrop",
    "return_dict",
    "rope_interleaved", // SmolLM2 writes false, and `true` is refused below
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

impl Config {
    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Field`] for a field that is missing, has a value that it cannot have, asks for something that is not
    /// implemented, or is not known; [`Error::Checkpoint`] for text that is not JSON, or another quantization than
    /// NF4.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        // This also reports text that is not a JSON object.
        let quantization = QuantizationConfig::from_config(text)?;
        let fields: Map<String, Value> = serde_json::from_slice(text).unwrap_or_default();
        let fields = Fields::new("", &fields);
        let model_type = fields.text("model_type")?;
        let family = Family::ALL.into_iter().find(|f| f.model_type() == model_type);
        let family = family.ok_or_else(|| fields.error("model_type", "llama, mistral, qwen2 or qwen3"))?;
        if fields.get("quantization_config").is_some() && quantization.is_none() {
            return Err(fields.error("quantization_config", "bitsandbytes in 4 bits"));
        }

        let (hidden, heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
        let head_dim = match fields.get("head_dim") {
            Some(_) => fields.size("head_dim")?,
            // transformers fixes 128 for Qwen3.
            None if family == Family::Qwen3 => 128,
            None => hidden / heads,
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(
                fields.error("head_dim", "an even number: hidden_size / num_attention_heads if it is not there")
            );
        }
        let kv_heads = match fields.get("num_key_value_heads") {
            Some(_) => fields.size("num_key_value_heads")?,
            None => heads,
        };
        if heads % kv_heads != 0 {
            return Err(fields.error("num_key_value_heads", format!("a divisor of the {heads} attention heads")));
        }
        fields.only("hidden_act", &["silu"])?;
        let attention_bias = fields.flag("attention_bias", false)?;
        let (qkv_bias, output_bias) = match family {
            Family::Llama | Family::Qwen3 => (attention_bias, attention_bias),
            Family::Qwen2 => (true, false),
            Family::Mistral => (false, false),
        };
        if attention_bias && matches!(family, Family::Qwen2 | Family::Mistral) {
            return Err(fields.error("attention_bias", format!("false, as {model_type} has it")));
        }
        let mlp_bias = fields.flag("mlp_bias", false)?;
        if mlp_bias && family != Family::Llama {
            return Err(fields.error("mlp_bias", format!("false, as {model_type} has it")));
        }
        let eps = fields.number("rms_norm_eps", Some(1e-6))?;
        let config = Self {
            family,
            hidden,
            intermediate: fields.size("intermediate_size")?,
            layers: fields.size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocabulary: fields.size("vocab_size")?,
            norm_eps: to_f32(eps),
            rope: rope(&fields, head_dim)?,
            positions: positions(&fields)?,
            tied: fields.flag("tie_word_embeddings", false)?,
            qkv_bias,
            output_bias,
            mlp_bias,
            qk_norm: family == Family::Qwen3,
            end_tokens: end_tokens(&fields)?,
            quantization,
        };
        fields.check_all_known(IGNORED)?;
        Ok(config)
    }

    /// Outputs of k and of v: all their heads.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Outputs of q: all its heads.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// The positions up to which every earlier one is attended to.
fn positions(fields: &Fields<'_>) -> Result<usize, Error> {
    let positions = fields.size("max_position_embeddings")?;
    // Qwen says with a flag whether its window counts.
    let has_window = fields.get("use_sliding_window").is_none() || fields.flag("use_sliding_window", false)?;
    let window = if fields.get("sliding_window").is_some() { fields.size("sliding_window")? } else { positions };
    let windowed = |v: &Value| v.as_array().is_some_and(|l| l.iter().all(|t| t == "full_attention"));
    if fields.get("layer_types").is_some_and(|types| !windowed(types)) && window == positions {
        return Err(fields.error("layer_types", "full_attention for each layer"));
    }
    Ok(if has_window { positions.min(window) } else { positions })
}

/// The rotary embedding, in the fields of transformers 5 (`rope_parameters`) or of those before (`rope_theta` and
/// `rope_scaling`).
fn rope(fields: &Fields<'_>, head_dim: usize) -> Result<Rope, Error> {
    fields.neutral("partial_rotary_factor", |v| v == 1 || v == 1.0, "1")?;
    fields.neutral("rope_interleaved", |v| v == false, "false")?;
    let parameters = fields.object("rope_parameters")?;
    let scaling = fields.object("rope_scaling")?;
    let theta = match &parameters {
        Some(inner) if inner.get("rope_theta").is_some() => inner.number("rope_theta", None)?,
        _ => fields.number("rope_theta", Some(10_000.0))?,
    };
    // Mentioned for the check of unknown fields where both generations are there.
    fields.get("rope_theta");
    let rope = match parameters.or(scaling) {
        None => Rope::new(theta, head_dim),
        Some(inner) => {
            inner.neutral("partial_rotary_factor", |v| v == 1 || v == 1.0, "1")?;
            inner.get("rope_theta");
            let name = if inner.get("rope_type").is_some() { "rope_type" } else { "type" };
            // Both names may be there.
            inner.get("type");
            let rope = match inner.get(name).map_or("default", |v| v.as_str().unwrap_or_default()) {
                "default" => Rope::new(theta, head_dim),
                "linear" => Rope::linear(theta, head_dim, inner.number("factor", None)?),
                "llama3" => Rope::llama3(
                    theta,
                    head_dim,
                    inner.number("factor", None)?,
                    inner.number("low_freq_factor", None)?,
                    inner.number("high_freq_factor", None)?,
                    inner.number("original_max_position_embeddings", None)?,
                ),
                _ => return Err(inner.error(name, "default, linear or llama3")),
            };
            inner.check_all_known(&[])?;
            rope
        }
    };
    rope.ok_or_else(|| fields.error("rope_theta", "finite and positive, as every factor of the scaling"))
}

/// A number or a list of numbers.
fn end_tokens(fields: &Fields<'_>) -> Result<Vec<u32>, Error> {
    let Some(value) = fields.get("eos_token_id") else { return Ok(Vec::new()) };
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let tokens = match value {
        Value::Array(list) => list.iter().map(one).collect(),
        other => one(other).map(|id| alloc::vec![id]),
    };
    tokens.ok_or_else(|| fields.error("eos_token_id", "a token or a list of tokens"))
}

#[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn to_f32(x: f64) -> f32 {
    x as f32
}

/// The fields of an object, which notes those that were asked for.
struct Fields<'a> {
    /// What stands before a field's name in an error.
    path: String,
    fields: &'a Map<String, Value>,
    used: core::cell::RefCell<Vec<String>>,
}

impl<'a> Fields<'a> {
    fn new(path: &str, fields: &'a Map<String, Value>) -> Self {
        Self { path: path.to_string(), fields, used: core::cell::RefCell::default() }
    }

    /// The value of a field; `None` if it is missing or null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.used.borrow_mut().push(field.to_string());
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn error(&self, field: &str, expected: impl Into<String>) -> Error {
        let got = self.fields.get(field).map_or_else(|| "missing".to_string(), |value| shortened(&value.to_string()));
        Error::Field { field: format!("{}{field}", self.path), expected: expected.into(), got }
    }

    fn object(&self, field: &str) -> Result<Option<Self>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let inner = value.as_object().ok_or_else(|| self.error(field, "an object"))?;
        Ok(Some(Self::new(&format!("{}{field}.", self.path), inner)))
    }

    fn text(&self, field: &str) -> Result<&'a str, Error> {
        self.get(field).and_then(Value::as_str).ok_or_else(|| self.error(field, "a string"))
    }

    /// A size that memory can be taken for: at least 1, and below 2^31 so that products of two fit.
    fn size(&self, field: &str) -> Result<usize, Error> {
        let size = self.get(field).and_then(Value::as_u64).filter(|n| (1..1 << 31).contains(n));
        size.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| self.error(field, "a number from 1 to 2147483647"))
    }

    fn number(&self, field: &str, default: Option<f64>) -> Result<f64, Error> {
        match (self.get(field), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => value.and_then(Value::as_f64).ok_or_else(|| self.error(field, "a number")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        self.get(field).map_or(Some(default), Value::as_bool).ok_or_else(|| self.error(field, "true or false"))
    }

    fn only(&self, field: &str, allowed: &[&str]) -> Result<(), Error> {
        self.neutral(field, |value| value.as_str().is_some_and(|v| allowed.contains(&v)), &allowed.join(" or "))
    }

    /// `Ok` if the field is missing or has a value that changes nothing.
    fn neutral(&self, field: &str, is_neutral: impl Fn(&Value) -> bool, expected: &str) -> Result<(), Error> {
        if self.get(field).is_none_or(is_neutral) { Ok(()) } else { Err(self.error(field, expected)) }
    }

    /// `Ok` if every field was asked for, is in the list, is private (`_name_or_path`), or is switched off.
    fn check_all_known(&self, ignored: &[&str]) -> Result<(), Error> {
        let used = self.used.borrow();
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(object) => object.is_empty(),
            _ => false,
        };
        let unknown = self.fields.iter().find(|(field, value)| {
            !used.contains(field) && !ignored.contains(&&***field) && !field.starts_with('_') && !is_off(value)
        });
        unknown.map_or(Ok(()), |(field, _)| Err(self.error(field, "nothing: this field is not known here")))
    }
}

/// A text for a message, not longer than a line.
fn shortened(text: &str) -> String {
    if text.chars().nth(80).is_none() { text.to_string() } else { text.chars().take(80).chain("...".chars()).collect() }
}
