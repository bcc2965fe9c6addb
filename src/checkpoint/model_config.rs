//! `config.json`: its description of the weights of a model, and the changes that it needs when they change.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde_json::{Map, Value};

use super::error::CheckpointError;
use super::float::FloatType;
use super::json::{Object, to_python, to_strings};

const CONFIG: &str = "config.json";
pub(super) const SECTION: &str = "quantization_config";

/// Where a configuration can describe a quantization; the second is that of older `compressed-tensors`.
const SECTIONS: [&str; 2] = [SECTION, "compression_config"];

/// Before transformers 4.56 the field was called `torch_dtype`.
const DTYPES: [&str; 2] = ["dtype", "torch_dtype"];

const TIED: &str = "tie_word_embeddings";

/// The configuration of a model: the fields of its `config.json`.
///
/// Infinities and NaN, which Python writes and JSON does not have, are kept: in [`Self::fields`] they are strings, and
/// [`Self::to_text`] writes them as Python does.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    fields: Map<String, Value>,
}

/// The format of the weights of a model, according to its configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quantization {
    /// Not quantized.
    None,
    /// 4-bit weights of `bitsandbytes`.
    FourBit,
    /// Another format.
    Other {
        /// The name of the quantization method.
        method: String,
        /// Modules that are not packed, as [`SkippedModules`](super::SkippedModules) compares them.
        skipped: Vec<String>,
    },
}

impl ModelConfig {
    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`CheckpointError::Json`] if it is not a JSON object.
    pub fn parse(text: &[u8]) -> Result<Self, CheckpointError> {
        Ok(Self { fields: Object::parse_python(CONFIG, text)?.into_fields() })
    }

    /// The text, sorted and indented as transformers writes it, and a line end.
    ///
    /// # Errors
    /// [`CheckpointError::Json`], which no parsed configuration gives.
    pub fn to_text(&self) -> Result<String, CheckpointError> {
        let text = serde_json::to_string_pretty(&self.fields);
        let fail = |e: serde_json::Error| CheckpointError::Json { what: CONFIG.to_owned(), reason: e.to_string() };
        text.map(|text| to_python(text) + "\n").map_err(fail)
    }

    /// All fields.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// All fields, mutably.
    pub(super) fn fields_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.fields
    }

    pub(super) fn object(&self) -> Object<'static> {
        Object::from_fields(CONFIG, self.fields.clone())
    }

    /// The types of the model and of its parts, such as `gemma3`, `gemma3_text` and `siglip_vision_model`.
    pub(super) fn model_types(&self) -> impl Iterator<Item = &str> {
        self.objects().into_iter().filter_map(|fields| fields.get("model_type")?.as_str())
    }

    /// The first of the architectures, such as `LlamaForCausalLM`.
    #[must_use]
    pub fn architecture(&self) -> Option<&str> {
        self.fields.get("architectures")?.as_array()?.first()?.as_str()
    }

    /// Whether input and output embeddings share a weight; `None` if the configuration does not say.
    #[must_use]
    pub fn is_tied(&self) -> Option<bool> {
        self.fields.get(TIED).and_then(Value::as_bool).or_else(|| {
            let mut parts = self.objects().into_iter().filter_map(|fields| fields.get(TIED)?.as_bool());
            parts.next()
        })
    }

    /// The vocabulary size, of the model or of its text part.
    #[must_use]
    pub fn vocabulary(&self) -> Option<usize> {
        let size = |fields: &Map<String, Value>| usize::try_from(fields.get("vocab_size")?.as_u64()?).ok();
        self.objects().into_iter().find_map(size)
    }

    /// The format of the weights.
    #[must_use]
    pub fn quantization(&self) -> Quantization {
        let sections = |fields: &Map<String, Value>| -> Vec<Map<String, Value>> {
            SECTIONS.iter().filter_map(|name| fields.get(*name)?.as_object().cloned()).collect()
        };
        let mut four_bit = false;
        for section in self.objects().into_iter().flat_map(sections) {
            if is_four_bit(&section) {
                four_bit = true;
            } else if let Some(method) = other_method(&section) {
                const SKIPPED: [&str; 6] = [
                    "llm_int8_skip_modules",
                    "modules_to_not_convert",
                    "ignore",
                    "ignored_layers",
                    "exclude",
                    "skip_modules",
                ];
                let lists = SKIPPED.iter().filter_map(|name| to_strings(section.get(*name)?)).flatten();
                // In `compressed-tensors` an expression is marked.
                let skipped = lists.map(|entry| entry.trim_start_matches("re:").to_owned()).collect();
                return Quantization::Other { method, skipped };
            }
        }
        if four_bit { Quantization::FourBit } else { Quantization::None }
    }

    /// The float type that packed bytes of `bitsandbytes` are said to have, if it is one.
    pub(super) fn quant_storage(&self) -> Option<FloatType> {
        let section = self.fields.get(SECTION)?.as_object().filter(|section| is_four_bit(section))?;
        FloatType::from_torch_name(section.get("bnb_4bit_quant_storage")?.as_str()?)
    }

    /// The top level, and the configurations of the parts of the model.
    fn objects(&self) -> Vec<&Map<String, Value>> {
        let mut objects = Vec::new();
        collect(&self.fields, DEPTH, &mut objects);
        objects
    }
}

/// What is to change in a configuration with the weights.
#[derive(Debug, Clone, Default)]
pub(super) struct Edits {
    /// The type of the weights.
    pub(super) dtype: FloatType,
    /// Whether all parts get this type; if not, those that had the type of the whole.
    pub(super) everywhere: bool,
    /// Whether nothing is quantized any longer.
    pub(super) dequantized: bool,
    /// Whether input and output embeddings are no longer one weight.
    pub(super) untied: bool,
    /// The number of words before and now.
    pub(super) vocabulary: Option<(usize, usize)>,
    /// A new head: the architecture, if it is known, and the number of labels.
    pub(super) head: Option<(Option<String>, Option<usize>)>,
}

impl ModelConfig {
    /// Makes the changes.
    pub(super) fn edit(&mut self, edits: &Edits) {
        let before = DTYPES.iter().find_map(|name| self.fields.get(*name)).cloned();
        let dtype = Value::from(edits.dtype.torch_name());
        each_part(&mut self.fields, DEPTH, &mut |fields| {
            if edits.dequantized {
                SECTIONS.iter().for_each(|name| drop(fields.remove(*name)));
            }
            for name in DTYPES {
                let Some(value) = fields.get_mut(name) else { continue };
                let is_float = value.as_str().is_some_and(|name| FloatType::from_torch_name(name).is_some());
                if is_float && (edits.everywhere || Some(&*value) == before.as_ref()) {
                    *value = dtype.clone();
                }
            }
            if let Some(tied) = fields.get_mut(TIED).filter(|_| edits.untied) {
                *tied = false.into();
            }
            if let Some((old, new)) = edits.vocabulary
                && let Some(size) = fields.get_mut("vocab_size").filter(|size| size.as_u64() == Some(old as u64))
            {
                *size = new.into();
            }
        });
        let name = if self.fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        self.fields.insert(name.to_owned(), dtype);
        if edits.untied {
            self.fields.insert(TIED.to_owned(), false.into());
        }
        if let Some((architecture, labels)) = &edits.head {
            if let Some(architecture) = architecture {
                self.fields.insert("architectures".to_owned(), alloc::vec![Value::from(architecture.clone())].into());
            }
            if let Some(labels) = labels {
                self.set_labels(*labels);
            }
        }
    }

    /// Gives the model this many labels, unless it has as many.
    fn set_labels(&mut self, count: usize) {
        let known = self.fields.get("id2label").and_then(Value::as_object).map(Map::len);
        if known == Some(count) {
            return;
        }
        let name = |i: usize| format!("LABEL_{i}");
        let by_id: Map<String, Value> = (0..count).map(|i| (i.to_string(), name(i).into())).collect();
        let by_name: Map<String, Value> = (0..count).map(|i| (name(i), i.into())).collect();
        self.fields.insert("id2label".to_owned(), by_id.into());
        self.fields.insert("label2id".to_owned(), by_name.into());
    }
}

/// How deep configurations stand in each other: that of a model for speech has a thinker, which has a text part.
const DEPTH: usize = 3;

/// Whether a field is the configuration of a part of the model.
fn is_part(name: &str, value: &Value) -> bool {
    let Some(fields) = value.as_object() else { return false };
    !SECTIONS.contains(&name) && (name.ends_with("_config") || fields.contains_key("model_type"))
}

fn collect<'a>(fields: &'a Map<String, Value>, depth: usize, objects: &mut Vec<&'a Map<String, Value>>) {
    objects.push(fields);
    let parts = fields.iter().filter(|(name, value)| depth > 0 && is_part(name, value));
    parts.filter_map(|(_, value)| value.as_object()).for_each(|part| collect(part, depth - 1, objects));
}

fn each_part(fields: &mut Map<String, Value>, depth: usize, f: &mut dyn FnMut(&mut Map<String, Value>)) {
    f(fields);
    let parts = fields.iter_mut().filter(|(name, value)| depth > 0 && is_part(name, value));
    parts.filter_map(|(_, value)| value.as_object_mut()).for_each(|part| each_part(part, depth - 1, f));
}

/// Whether a section describes 4-bit weights of `bitsandbytes`.
pub(super) fn is_four_bit(section: &Map<String, Value>) -> bool {
    is_by_bitsandbytes(section) && is_true(section, "load_in_4bit")
}

/// As in `AutoQuantizationConfig.from_dict` of transformers: the flags say so without a method too.
fn is_by_bitsandbytes(section: &Map<String, Value>) -> bool {
    let method = section.get("quant_method").filter(|method| !method.is_null());
    method.is_none_or(|method| method == "bitsandbytes")
}

fn is_true(section: &Map<String, Value>, field: &str) -> bool {
    section.get(field).is_some_and(|value| value == true)
}

/// The method of a section that describes weights in another format, if it does.
fn other_method(section: &Map<String, Value>) -> Option<String> {
    match section.get("quant_method").and_then(Value::as_str) {
        Some("bitsandbytes") | None if is_true(section, "load_in_8bit") => Some("int8 of bitsandbytes".to_owned()),
        Some("bitsandbytes") => None,
        Some(method) => Some(method.to_owned()),
        None if section.is_empty() => None,
        None => Some("a quantization without quant_method".to_owned()),
    }
}
