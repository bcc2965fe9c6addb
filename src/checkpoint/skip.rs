//! The lists by which loaders leave modules as they are.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use regex::Regex;

use super::error::CheckpointError;
use super::names::Ends;
use super::peft::{WORK_LIMIT, compile};

/// Bytes that a compiled entry may take, and the number of entries that are compiled, so that a file cannot make them
/// many; those beyond leave nothing as it is.
const SIZE_LIMIT: usize = 1 << 18;
const COUNT_LIMIT: usize = 64;

/// A list of modules that are left as they are.
///
/// As in transformers 5 (`should_convert_module` in `quantizers/quantizers_utils.py`) an entry is the end of a name, or a
/// regular expression that matches the name from its start up to the border of a part. In `compressed-tensors` an entry
/// `re:...` is an expression.
pub(super) struct Skipped<'a> {
    names: Ends<'a, ()>,
    expressions: Vec<Regex>,
    /// Bytes that the expressions take.
    size: usize,
}

impl<'a> Skipped<'a> {
    pub(super) fn new(entries: &'a [String]) -> Self {
        let entries = || entries.iter().map(|entry| entry.trim_start_matches("re:"));
        let compiled = entries().filter(|entry| !is_name(entry)).take(COUNT_LIMIT);
        let compiled = compiled.filter_map(|entry| compile(&format!("^(?:{entry})$"), SIZE_LIMIT).ok());
        let (expressions, sizes): (Vec<Regex>, Vec<usize>) = compiled.unzip();
        Self { names: Ends::new(entries().map(|entry| (entry, ()))), expressions, size: sizes.iter().sum() }
    }

    /// The first of these modules that is not left as it is.
    pub(super) fn first_other<'m>(&self, modules: &'m [String]) -> Result<Option<&'m String>, CheckpointError> {
        // Each border of a name is one match with what is before it.
        let letters = |module: &String| borders(module).sum::<usize>();
        let work = modules.iter().map(letters).fold(0_usize, usize::saturating_add).saturating_mul(self.size);
        if work > WORK_LIMIT {
            return Err(CheckpointError::Field {
                what: "config.json".to_owned(),
                field: "modules_to_not_convert".to_owned(),
                expected: "expressions that can be matched with all modules in a few seconds",
                got: format!("expressions of {} bytes in all, for {} modules", self.size, modules.len()),
            });
        }
        Ok(modules.iter().find(|module| !self.has(module)))
    }

    fn has(&self, module: &str) -> bool {
        self.names.anywhere(module).next().is_some()
            || borders(module).any(|end| self.names.is_one(&module[..end]))
            || self.expressions.iter().any(|regex| borders(module).any(|end| regex.is_match(&module[..end])))
    }
}

/// Where a part of a name ends, without its dot and with it.
fn borders(module: &str) -> impl Iterator<Item = usize> + '_ {
    module.match_indices('.').flat_map(|(at, _)| [at, at + 1]).chain([module.len()])
}

/// Whether an expression is a name: then it is compared. (A dot in it stands for any letter, but in names of modules no
/// other one stands in its place.)
fn is_name(entry: &str) -> bool {
    entry.chars().all(|c| c.is_alphanumeric() || ['_', '-', '.'].contains(&c))
}
