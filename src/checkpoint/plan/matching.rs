//! Which module of the model a module of an adapter is: the same one has other names in files of other savers, classes
//! and versions of transformers (`model.language_model.layers`, `language_model.model.layers`, `model.layers`, `layers`).
//!
//! A name is a prefix and a rest: the rest begins with the part before the first number (`layers.0.mlp.up_proj`), or is
//! the last part. Modules of one prefix belong together: either the model has that prefix, or all of them must be there
//! under one other prefix, and under no second one as similar.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::names::{join, last};

/// Parts that hub files and the modules of transformers call differently; each stands for the other.
const SYNONYMS: [[&str; 2]; 2] = [["mlp", "block_sparse_moe"], ["lm_head", "embed_out"]];

/// Prefixes that are tried, so that the time does not grow with the square of the names; no model has as many for one rest.
const MOST: usize = 64;

/// The modules of a model.
pub(super) struct ModelNames<'a> {
    modules: BTreeSet<&'a str>,
    /// The prefixes of each rest.
    prefixes: BTreeMap<&'a str, Vec<&'a str>>,
}

impl<'a> ModelNames<'a> {
    pub(super) fn new(tensors: impl Iterator<Item = &'a str>) -> Self {
        let (mut modules, mut prefixes) = (BTreeSet::new(), BTreeMap::<_, Vec<_>>::new());
        for tensor in tensors {
            for (end, _) in tensor.match_indices('.') {
                let module = &tensor[..end];
                if modules.insert(module) {
                    let (prefix, rest) = split(module);
                    prefixes.entry(rest).or_default().push(prefix);
                }
            }
        }
        Self { modules, prefixes }
    }

    pub(super) fn has(&self, module: &str) -> bool {
        self.modules.contains(module)
    }

    /// The module that has the most last parts, and then the most first letters, in common with a name.
    pub(super) fn nearest(&self, name: &str) -> Option<String> {
        let likeness = |module: &&&str| {
            let ends = module.rsplit('.').zip(name.rsplit('.')).take_while(|(a, b)| a == b).count();
            let starts = module.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
            (ends, starts)
        };
        self.modules.iter().max_by_key(likeness).map(|module| (*module).to_owned())
    }

    /// The module of the model for each of these of an adapter. Those of which `may_be_new` holds may be missing.
    pub(super) fn map<'n>(
        &self,
        modules: &BTreeSet<&'n str>,
        may_be_new: &dyn Fn(&str) -> bool,
    ) -> Result<BTreeMap<&'n str, String>, CheckpointError> {
        let mut groups: BTreeMap<&str, Vec<&'n str>> = BTreeMap::new();
        for module in modules {
            groups.entry(split(module).0).or_default().push(module);
        }
        let mut mapped = BTreeMap::new();
        for (prefix, group) in groups {
            let new_prefix = self.prefix(prefix, &group, may_be_new)?;
            for module in group {
                let name = join(new_prefix, split(module).1);
                let known = [Some(name.clone()), self.synonym(&name)].into_iter().flatten().find(|name| self.has(name));
                match known {
                    Some(name) => drop(mapped.insert(module, name)),
                    None if may_be_new(module) => drop(mapped.insert(module, module.to_owned())),
                    None => return Err(self.missing(module)),
                }
            }
        }
        let mut taken = BTreeMap::new();
        for (module, name) in &mapped {
            if let Some(other) = taken.insert(name, module) {
                let reason = format!("the adapter's {other} and {module} would both be this module");
                return Err(CheckpointError::Unexpected { tensor: name.clone(), reason });
            }
        }
        Ok(mapped)
    }

    pub(super) fn missing(&self, name: &str) -> CheckpointError {
        CheckpointError::NotInModel { name: name.to_owned(), nearest: self.nearest(name) }
    }

    /// The prefix under which the model has the modules of a group.
    fn prefix<'s>(
        &'s self,
        prefix: &'s str,
        group: &[&str],
        may_be_new: &dyn Fn(&str) -> bool,
    ) -> Result<&'s str, CheckpointError> {
        let has = |prefix: &str, module: &str| {
            let name = join(prefix, split(module).1);
            self.has(&name) || self.synonym(&name).is_some_and(|name| self.has(&name))
        };
        if group.iter().any(|module| has(prefix, module)) {
            return Ok(prefix);
        }
        let Some(first) = group.iter().find(|module| !may_be_new(module)).or(group.first()) else { return Ok(prefix) };
        let rests = [Some(split(first).1.to_owned()), self.synonym(split(first).1)];
        let prefixes = rests.iter().flatten().filter_map(|rest| self.prefixes.get(rest.as_str())).flatten().take(MOST);
        let mut fitting: Vec<&str> =
            prefixes.copied().filter(|new| group.iter().all(|module| may_be_new(module) || has(new, module))).collect();
        fitting.sort_unstable();
        fitting.dedup();
        let common = |new: &str| new.split('.').filter(|part| prefix.split('.').any(|p| p == *part)).count();
        let most = fitting.iter().map(|new| common(new)).max();
        let mut best = fitting.iter().filter(|new| Some(common(new)) == most);
        match (best.next(), best.next()) {
            (None, _) => {
                let all_new = group.iter().all(|module| may_be_new(module));
                if all_new { Ok(prefix) } else { Err(self.missing(first)) }
            }
            (Some(only), None) => Ok(only),
            (Some(one), Some(two)) => {
                let rest = split(first).1;
                let reason =
                    format!("the model has {} and {}, and either may be meant", join(one, rest), join(two, rest));
                Err(CheckpointError::Unexpected { tensor: (*first).to_owned(), reason })
            }
        }
    }

    /// A name with the synonyms of its parts, if any has one.
    fn synonym(&self, name: &str) -> Option<String> {
        let other = |part: &str| {
            SYNONYMS.iter().find_map(|[a, b]| if part == *a { Some(*b) } else { (part == *b).then_some(*a) })
        };
        name.split('.').any(|part| other(part).is_some()).then(|| {
            let parts: Vec<&str> = name.split('.').map(|part| other(part).unwrap_or(part)).collect();
            parts.join(".")
        })
    }
}

/// Prefix and rest of a name.
fn split(name: &str) -> (&str, &str) {
    let mut start = 0;
    let mut before = None;
    for part in name.split('.') {
        if part.bytes().all(|b| b.is_ascii_digit()) && !part.is_empty() {
            return at(name, before.unwrap_or(start));
        }
        before = Some(start);
        start += part.len() + 1;
    }
    at(name, name.len() - last(name).len())
}

fn at(name: &str, start: usize) -> (&str, &str) {
    (name[..start].trim_end_matches('.'), &name[start..])
}
