//! `quantization_config` in the `config.json` of a model.
//!
//! The fields are those of `BitsAndBytesConfig.to_dict()` in transformers (5.23, `utils/quantization_config.py`), which
//! is what `save_pretrained` puts there and what `from_pretrained` makes its 4-bit layers from.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::error::CheckpointError;
use super::float::FloatType;
use super::json::{Object, to_strings};
use super::model_config::{ModelConfig, SECTION, is_four_bit};

/// The section of a `config.json` by which transformers loads the 4-bit layers of a model.
#[doc(alias = "BitsAndBytesConfig")]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct QuantizationConfig {
    /// Whether scales are double-quantized.
    pub double_quant: bool,
    /// The type in which transformers multiplies; it does not change what is stored.
    pub compute_dtype: FloatType,
    /// The type that the file states for packed bytes: `U8` or a float type.
    pub quant_storage: Dtype,
    /// Modules that are not quantized, by full name or by its end. `None` is the default of transformers, the output layer
    /// (`lm_head`), which a list has to contain.
    pub skip_modules: Option<Vec<String>>,
}

impl Default for QuantizationConfig {
    fn default() -> Self {
        Self { double_quant: false, compute_dtype: FloatType::F32, quant_storage: Dtype::U8, skip_modules: None }
    }
}

impl QuantizationConfig {
    /// Parses the section in the text of a `config.json`; `None` if `bitsandbytes` did not quantize the model to 4 bits. As
    /// in transformers, `load_in_4bit` suffices without a `quant_method`.
    ///
    /// # Errors
    /// [`CheckpointError::Json`]; [`CheckpointError::Field`]; [`CheckpointError::Unsupported`] for FP4.
    pub fn from_config(config: &[u8]) -> Result<Option<Self>, CheckpointError> {
        let config = ModelConfig::parse(config)?;
        let object = config.object();
        let Some(section) = object.optional(SECTION, "an object", None, |v| v.as_object().map(Some))? else {
            return Ok(None);
        };
        let section = Object::from_fields(SECTION, section.clone());
        section.optional("load_in_4bit", "true or false", false, Value::as_bool)?;
        if !is_four_bit(section.fields()) {
            return Ok(None);
        }
        // Both defaults are those of BitsAndBytesConfig.
        match section.optional("bnb_4bit_quant_type", "a string", "fp4", Value::as_str)? {
            "nf4" => {}
            other => return Err(CheckpointError::Unsupported { what: SECTION.to_owned(), variant: other.to_owned() }),
        }
        let float = |v: &Value| FloatType::from_torch_name(v.as_str()?);
        Ok(Some(Self {
            double_quant: section.optional("bnb_4bit_use_double_quant", "true or false", false, Value::as_bool)?,
            compute_dtype: section.optional(
                "bnb_4bit_compute_dtype",
                "float32, float16 or bfloat16",
                FloatType::F32,
                float,
            )?,
            quant_storage: section.optional(
                "bnb_4bit_quant_storage",
                "uint8, float32, float16 or bfloat16",
                Dtype::U8,
                |v| if v == "uint8" { Some(Dtype::U8) } else { float(v).map(FloatType::dtype) },
            )?,
            skip_modules: section
                .optional("llm_int8_skip_modules", "a list of strings", None, |v| to_strings(v).map(Some))?,
        }))
    }

    /// The section as transformers writes it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let storage = FloatType::from_dtype(self.quant_storage).map_or("uint8", FloatType::torch_name);
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": self.compute_dtype.torch_name(),
            "bnb_4bit_quant_storage": storage,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        })
    }

    /// Inserts this section into the text of a `config.json`, or replaces the one that it has. The result is sorted and
    /// indented like transformers writes it.
    ///
    /// # Errors
    /// [`CheckpointError::Json`] if `config` is not a JSON object.
    pub fn insert_into(&self, config: &[u8]) -> Result<String, CheckpointError> {
        let mut config = ModelConfig::parse(config)?;
        config.fields_mut().insert(SECTION.to_owned(), self.to_json());
        config.to_text()
    }
}
