//! Which weights are quantized: those that transformers expects to be.
//!
//! transformers replaces every `nn.Linear` of a model by a 4-bit layer, except the modules in `llm_int8_skip_modules`
//! and, if there is no such list, the output head. A file does not name the classes of modules, so a weight counts as
//! that of a `Linear` if
//!
//! 1. it is named `<module>.weight`, has two dimensions, and the type F32, F16 or BF16;
//! 2. `<module>` is not an embedding: its last part does not contain `embed`, and is none of [`EMBEDDINGS`];
//! 3. `<module>` is not skipped by an entry of the list. As in transformers 5 (`should_convert_module` in
//!    `quantizers/quantizers_utils.py`), an entry skips the modules that end with it, and those that it matches, as a
//!    regular expression, from the start up to the border of a part: `model.layers.1` skips all of that layer and none
//!    of layer 11. The list goes to `llm_int8_skip_modules` in `config.json`, so both agree.
//!
//! The list is what the user names and, unless he wants it quantized, the output head: `lm_head`, and those of
//! [`HEADS`] that the model has. Norms have one dimension, convolutions and fused experts three or more; these stay as
//! they are, as they do in transformers.

use anyhow::{Result, anyhow};
use regex::Regex;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

/// Embeddings that are not called so: GPT-2 and its kin, T5.
const EMBEDDINGS: [&str; 4] = ["wte", "wpe", "shared", "relative_attention_bias"];

/// Output heads of models with another task or name, which transformers does not quantize either.
const HEADS: [&str; 4] = ["embed_out", "score", "classifier", "qa_outputs"];

/// Model types whose `Linear` layers are stored transposed (`Conv1D`); quantizing those would cut other blocks.
pub(crate) const TRANSPOSED: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// The modules that are not quantized.
#[derive(Debug)]
pub(crate) struct Skip {
    pub(crate) list: Vec<String>,
    /// An expression for each entry, to be matched with whole texts.
    expressions: Vec<Regex>,
}

impl Skip {
    /// The user's list, and the heads if `heads` is given; `names` are the model's tensors.
    pub(crate) fn new<'a>(user: &[String], heads: bool, names: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut list = Vec::new();
        if heads {
            list.push("lm_head".to_owned());
            list.extend(names.filter_map(module).filter(|m| HEADS.contains(m)).map(str::to_owned));
        }
        list.extend(user.iter().cloned());
        let mut seen = std::collections::HashSet::new();
        list.retain(|name| seen.insert(name.clone()));
        let compile = |entry: &String| {
            Regex::new(&format!("^(?:{entry})$")).map_err(|e| anyhow!("--skip {entry}: no regular expression: {e}"))
        };
        let expressions = list.iter().map(compile).collect::<Result<_>>()?;
        Ok(Self { list, expressions })
    }

    fn skips(&self, module: &str) -> bool {
        let ends = self.list.iter().any(|entry| module.ends_with(&**entry));
        // Before and after each dot, and at the end.
        let dots = module.match_indices('.').flat_map(|(at, _)| [at, at + 1]);
        ends || dots.chain([module.len()]).any(|end| self.expressions.iter().any(|e| e.is_match(&module[..end])))
    }

    /// The module whose `Linear` weight a tensor is, if it is one and is not skipped.
    pub(crate) fn linear<'a>(&self, name: &'a str, info: &TensorInfo) -> Option<&'a str> {
        let module = module(name)?;
        let last = module.rsplit('.').next().unwrap_or(module);
        let is_float = [Dtype::F32, Dtype::F16, Dtype::BF16].contains(&info.dtype);
        let is_embedding = last.contains("embed") || EMBEDDINGS.contains(&last);
        (is_float && info.shape.len() == 2 && !is_embedding && !self.skips(module)).then_some(module)
    }
}

/// `<module>` of `<module>.weight`.
fn module(name: &str) -> Option<&str> {
    name.strip_suffix(".weight").filter(|module| !module.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(dtype: Dtype, shape: &[usize]) -> TensorInfo {
        TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (0, 0) }
    }

    #[test]
    fn rule() {
        let names = ["model.embed_tokens.weight", "score.weight", "model.layers.0.mlp.up_proj.weight"];
        let user = ["gate", "lm_head", "model.layers.1", "vision_.*"].map(str::to_owned);
        let skip = Skip::new(&user, true, names.into_iter()).unwrap();
        assert_eq!(skip.list, ["lm_head", "score", "gate", "model.layers.1", "vision_.*"]);
        let matrix = info(Dtype::BF16, &[8, 4]);
        for (name, expected) in [
            ("model.layers.0.mlp.up_proj.weight", true),
            ("model.layers.0.mlp.gate_proj.weight", true),
            ("model.layers.0.mlp.gate.weight", false),
            ("model.layers.1.mlp.up_proj.weight", false),
            ("model.layers.11.mlp.up_proj.weight", true),
            ("vision_tower.blocks.3.fc1.weight", false),
            ("my_vision_tower.fc1.weight", true),
            ("model.embed_tokens.weight", false),
            ("embeddings.word_embeddings.weight", false),
            ("transformer.wte.weight", false),
            ("lm_head.weight", false),
            ("score.weight", false),
            ("model.layers.0.mlp.up_proj.bias", false),
            (".weight", false),
            ("weight", false),
        ] {
            assert_eq!(skip.linear(name, &matrix).is_some(), expected, "{name}");
        }
        for other in [info(Dtype::BF16, &[8]), info(Dtype::BF16, &[8, 4, 2]), info(Dtype::I32, &[8, 4])] {
            assert_eq!(skip.linear("a.up_proj.weight", &other), None, "{other:?}");
        }
        let none = Skip::new(&[], false, names.into_iter()).unwrap();
        assert_eq!(none.linear("score.weight", &matrix), Some("score"));
        assert!(Skip::new(&["*".to_owned()], false, names.into_iter()).is_err());
    }
}
