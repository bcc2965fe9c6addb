//! The lists by which loaders leave modules as they are.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use fancy_regex::{Regex, RegexBuilder};

use super::error::CheckpointError;
use super::json::shortened;

/// Bytes that a compiled entry may take, and all of a list together, so that a file cannot make them large.
const SIZE_LIMIT: usize = 1 << 20;
const TOTAL_LIMIT: usize = 1 << 26;
/// Entries of a list that are not names: with more of them, the share of each would be less than a simple one takes.
const COUNT_LIMIT: usize = TOTAL_LIMIT >> 14;
/// Bytes of the text of an entry, which is parsed before any other limit holds.
const TEXT_LIMIT: usize = 1 << 12;
/// Steps back that a match may take; an expression that needs more grows exponentially.
const BACKTRACK_LIMIT: usize = 100_000;
/// The product of the bytes of all expressions and of the letters of all modules that a file has compared with them.
const WORK_LIMIT: usize = if usize::BITS > 32 { 1 << 31 } else { usize::MAX };

/// A list of modules that a loader leaves as they are: `llm_int8_skip_modules`, `modules_to_not_convert`.
///
/// As in transformers 5 (`should_convert_module` in `quantizers/quantizers_utils.py`), an entry skips the modules whose
/// name ends with it, and those whose name it matches, as a regular expression in Python's syntax, from the start up to
/// the border of a part: `model.layers.1` skips all of that layer and none of layer 11.
///
/// ```
/// use nf4::checkpoint::SkippedModules;
/// let skipped = SkippedModules::new(["lm_head", r"model\.(?!layers).*"])?;
/// assert!(skipped.has("lm_head")? && skipped.has("model.vision.fc1")?);
/// assert!(!skipped.has("model.layers.0.mlp.up_proj")?);
/// # Ok::<(), nf4::checkpoint::CheckpointError>(())
/// ```
#[doc(alias = "llm_int8_skip_modules")]
#[derive(Debug, Clone, Default)]
pub struct SkippedModules {
    entries: Vec<String>,
    /// The same, to be looked up, and their lengths.
    known: BTreeSet<String>,
    lens: BTreeSet<usize>,
    /// Entries that are not names.
    expressions: Vec<(String, Regex)>,
}

impl SkippedModules {
    /// A list; an entry that stands in it twice counts once.
    ///
    /// # Errors
    /// [`CheckpointError::Field`] for an entry that is empty, which would skip every module, that is no regular
    /// expression, or that is too large.
    pub fn new<S: AsRef<str>>(entries: impl IntoIterator<Item = S>) -> Result<Self, CheckpointError> {
        let mut list = Self::default();
        for entry in entries {
            if list.known.insert(entry.as_ref().to_owned()) {
                list.lens.insert(entry.as_ref().len());
                list.entries.push(entry.as_ref().to_owned());
            }
        }
        let count = list.entries.iter().filter(|entry| !is_name(entry)).count();
        if count > COUNT_LIMIT {
            return Err(error("names and at most 4096 other regular expressions", format!("{count} of these")));
        }
        if list.known.contains("") {
            return Err(error("names of modules", "an empty one, which would skip all".to_owned()));
        }
        let limit = SIZE_LIMIT.min(TOTAL_LIMIT / count.max(1));
        for entry in list.entries.iter().filter(|entry| !is_name(entry)) {
            list.expressions.push((entry.clone(), compile(entry, limit)?));
        }
        Ok(list)
    }

    /// Whether a module is left as it is.
    ///
    /// # Errors
    /// [`CheckpointError::Field`] for an expression that takes too long.
    pub fn has(&self, module: &str) -> Result<bool, CheckpointError> {
        let is_end = |len: &usize| {
            let end = module.len().checked_sub(*len).and_then(|start| module.get(start..));
            end.is_some_and(|end| self.known.contains(end))
        };
        let mut borders = module.match_indices('.').flat_map(|(at, _)| [at, at + 1]).chain([module.len()]);
        if self.lens.range(..=module.len()).any(is_end) || borders.any(|end| self.known.contains(&module[..end])) {
            return Ok(true);
        }
        for (entry, regex) in &self.expressions {
            let found = regex.is_match(module).map_err(|reason| {
                let got = format!("{}, compared with {}: {reason}", shortened(entry), shortened(module));
                error("expressions that can be compared in a short time", got)
            })?;
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The first of these modules that is not left as it is.
    pub(super) fn first_other<'m>(&self, modules: &'m [String]) -> Result<Option<&'m String>, CheckpointError> {
        let size: usize = self.expressions.iter().map(|(entry, _)| entry.len()).sum();
        let letters = modules.iter().fold(0_usize, |sum, module| sum.saturating_add(module.len()));
        if size.saturating_mul(letters) > WORK_LIMIT {
            let got = format!("expressions of {size} bytes in all, for {} modules", modules.len());
            return Err(error("expressions that can be matched with all modules in a few seconds", got));
        }
        for module in modules {
            if !self.has(module)? {
                return Ok(Some(module));
            }
        }
        Ok(None)
    }

    /// The entries, in their order.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(String::as_str)
    }
}

fn compile(entry: &str, limit: usize) -> Result<Regex, CheckpointError> {
    if entry.len() > TEXT_LIMIT {
        let expected = "names and regular expressions of at most 4096 bytes";
        return Err(error(expected, format!("{} bytes long: {}", entry.len(), shortened(entry))));
    }
    RegexBuilder::new(&format!(r"\A(?:{entry})(?:(?<=\.)|(?=\.|\z))"))
        .delegate_size_limit(limit)
        .backtrack_limit(BACKTRACK_LIMIT)
        .build()
        .map_err(|reason| error("names and regular expressions", format!("{}: {reason}", shortened(entry))))
}

/// Whether an expression is a name: then it is compared. (A dot in it stands for any letter, but in names of modules no
/// other one stands in its place.)
fn is_name(entry: &str) -> bool {
    entry.chars().all(|c| c.is_alphanumeric() || ['_', '-', '.'].contains(&c))
}

fn error(expected: &'static str, got: String) -> CheckpointError {
    let field = "modules_to_not_convert or llm_int8_skip_modules".to_owned();
    CheckpointError::Field { what: "modules that are not quantized".to_owned(), field, expected, got }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

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
            assert_eq!(SkippedModules::new([entry]).unwrap().has(module).unwrap(), expected, "{entry} and {module}");
        }
        assert_eq!(SkippedModules::new(["b", "a", "b"]).unwrap().entries().collect::<Vec<_>>(), ["b", "a"]);
        assert!(!SkippedModules::default().has("a").unwrap());
    }

    #[test]
    fn errors() {
        let long = "(a)".repeat(TEXT_LIMIT);
        for entry in ["*", "", "(", r"\w{1000}\w{1000}", &long] {
            let error = SkippedModules::new([entry]).unwrap_err().to_string();
            assert!(error.len() < 400, "{error}");
        }
        let many = (0..=COUNT_LIMIT).map(|i| format!("a{{{i}}}"));
        assert!(SkippedModules::new(many).unwrap_err().to_string().contains("4097 of these"));
        let slow = SkippedModules::new([r"(?:(a|aa)+)+\1$"]).unwrap();
        assert!(slow.has(&("a".repeat(60) + "b")).is_err());
    }
}
