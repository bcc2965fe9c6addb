//! Lists of modules that are left as they are, compared as transformers compares them.

use anyhow::{Result, anyhow, bail};
use fancy_regex::Regex;

/// Entries of `llm_int8_skip_modules`, or of the lists that transformers adds to it.
///
/// As in transformers 5 (`should_convert_module` in `quantizers/quantizers_utils.py`), an entry skips the modules whose
/// name ends with it, and those whose name it matches, as a regular expression, from the start up to the border of a part:
/// `model.layers.1` skips all of that layer and none of layer 11.
#[derive(Debug, Default)]
pub(super) struct Skip {
    entries: Vec<(String, Regex)>,
}

impl Skip {
    /// A list without the entries that it has already.
    pub(super) fn new<S: AsRef<str>>(entries: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut skip = Self::default();
        for entry in entries {
            let entry = entry.as_ref();
            if skip.entries.iter().any(|(e, _)| e == entry) {
                continue;
            }
            if entry.is_empty() {
                bail!("an empty name of modules to skip would skip all");
            }
            let expression = Regex::new(&format!(r"\A(?:{entry})(?:(?<=\.)|(?=\.|\z))"))
                .map_err(|e| anyhow!("modules to skip: {entry}: no regular expression: {e}"))?;
            skip.entries.push((entry.to_owned(), expression));
        }
        Ok(skip)
    }

    /// Whether a module is left as it is.
    ///
    /// # Errors
    /// If an expression takes too long.
    pub(super) fn skips(&self, module: &str) -> Result<bool> {
        for (entry, expression) in &self.entries {
            let matches = || expression.is_match(module).map_err(|e| anyhow!("{entry}, compared with {module}: {e}"));
            if module.ends_with(&**entry) || matches()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The entries.
    pub(super) fn list(&self) -> Vec<String> {
        self.entries.iter().map(|(entry, _)| entry.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `should_convert_module` of transformers 5.23 said.
    #[test]
    fn as_transformers() {
        for (entry, module, expected) in [
            ("gate", "model.layers.0.mlp.gate", true),
            ("gate", "model.layers.0.mlp.gate.linear", false),
            ("gate", "gate.linear", true),
            ("gate", "model.layers.0.mlp.gate_proj", false),
            ("experts", "model.layers.0.mlp.experts.0.w1", false),
            (".*experts", "model.layers.0.mlp.experts.0.w1", true),
            ("model.layers.1", "model.layers.1.mlp.up_proj", true),
            ("model.layers.1", "model.layers.11.mlp.up_proj", false),
            ("layers.1", "model.layers.1.mlp.up_proj", false),
            ("vision_.*", "vision_tower.blocks.3.fc1", true),
            ("vision_.*", "my_vision_tower.fc1", false),
            ("model.layers.(0|1)", "model.layers.1.fc1", true),
            ("a|b", "b.fc1", true),
            ("a|b", "bc.fc1", false),
            (r"model\.(?!layers).*", "model.vision.fc1", true),
            (r"model\.(?!layers).*", "model.layers.fc1", false),
            ("model.", "model.layers", true),
            ("ver.", "model.ver.layers", false),
            ("wo", "encoder.block.0.layer.1.DenseReluDense.wo", true),
        ] {
            assert_eq!(Skip::new([entry]).unwrap().skips(module).unwrap(), expected, "{entry} and {module}");
        }
        assert_eq!(Skip::new(["b", "a", "b"]).unwrap().list(), ["b", "a"]);
        assert!(!Skip::default().skips("a").unwrap());
    }

    #[test]
    fn errors() {
        for entry in ["*", "", "("] {
            assert!(Skip::new([entry]).is_err(), "{entry}");
        }
        let slow = Skip::new([r"(?:(a|aa)+)+\1$"]).unwrap();
        assert!(slow.skips(&("a".repeat(60) + "b")).is_err());
    }
}
