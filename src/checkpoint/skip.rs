//! The lists by which loaders leave modules as they are.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use regex::{Regex, RegexBuilder};

/// Bytes that a compiled entry may take, and the number of entries that are compiled, so that a file cannot make them
/// many; those beyond leave nothing as it is.
const SIZE_LIMIT: usize = 1 << 18;
const COUNT_LIMIT: usize = 64;

/// A list of modules that are left as they are.
///
/// As in transformers 5 (`should_convert_module` in `quantizers/quantizers_utils.py`) an entry is the end of a name, or a
/// regular expression that matches the name from its start up to the border of a part. In `compressed-tensors` an entry
/// `re:...` is an expression.
pub(super) struct Skipped {
    names: Vec<String>,
    expressions: Vec<Regex>,
}

impl Skipped {
    pub(super) fn new(entries: &[String]) -> Self {
        let names: Vec<String> = entries.iter().map(|entry| entry.trim_start_matches("re:").to_owned()).collect();
        let compile = |entry: &String| RegexBuilder::new(&format!("^(?:{entry})$")).size_limit(SIZE_LIMIT).build().ok();
        let expressions = names.iter().filter(|entry| !is_name(entry)).take(COUNT_LIMIT).filter_map(compile).collect();
        Self { names, expressions }
    }

    pub(super) fn has(&self, module: &str) -> bool {
        let ends: Vec<usize> =
            module.match_indices('.').flat_map(|(at, _)| [at, at + 1]).chain([module.len()]).collect();
        let is_start = |name: &String| module.starts_with(name.as_str()) && ends.contains(&name.len());
        self.names.iter().any(|name| module.ends_with(name.as_str()) || is_start(name))
            || self.expressions.iter().any(|regex| ends.iter().any(|end| regex.is_match(&module[..*end])))
    }
}

/// Whether an expression is a name: then it is compared. (A dot in it stands for any letter, but in names of modules no
/// other one stands in its place.)
fn is_name(entry: &str) -> bool {
    entry.chars().all(|c| c.is_alphanumeric() || ['_', '-', '.'].contains(&c))
}
