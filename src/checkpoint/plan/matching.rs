//! Which module of the model a module of an adapter is: the same one has other names in files of other savers, classes
//! and versions of transformers (`model.language_model.layers`, `language_model.model.layers`, `model.layers`, `layers`).
//!
//! A name is a prefix and a rest: the rest begins with the part before the first number (`layers.0.mlp.up_proj`), or is the
//! last part, or what `modules_to_save` names. Modules of one prefix belong together: either the model has that prefix, or
//! all of them must be there under one other prefix, and under no second one as similar.

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

/// Names of the adapter's modules in the model.
pub(super) type Names<'n> = BTreeMap<&'n str, String>;

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

    /// The module of the model for each of these of an adapter. Those of which `may_be_new` holds may be missing; of each,
    /// what stands from this place on stays whole.
    pub(super) fn map<'n>(
        &self,
        modules: &BTreeMap<&'n str, usize>,
        may_be_new: &dyn Fn(&str) -> bool,
    ) -> Result<BTreeMap<&'n str, String>, CheckpointError> {
        let mut groups: BTreeMap<&str, Vec<Wanted<'n>>> = BTreeMap::new();
        for (name, whole_from) in modules {
            let (prefix, rest) = at(name, (name.len() - split(name).1.len()).min(*whole_from));
            groups.entry(prefix).or_default().push(Wanted { name, rest, may_be_new: may_be_new(name) });
        }
        let mut mapped = BTreeMap::new();
        for (prefix, group) in groups {
            let new_prefix = self.prefix(prefix, &group)?;
            for Wanted { name: module, rest, may_be_new } in group {
                let name = join(new_prefix, rest);
                let known = [Some(name.clone()), self.synonym(&name)].into_iter().flatten().find(|name| self.has(name));
                match known {
                    Some(name) => drop(mapped.insert(module, name)),
                    None if may_be_new => drop(mapped.insert(module, module.to_owned())),
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
    fn prefix<'s>(&'s self, prefix: &'s str, group: &[Wanted<'_>]) -> Result<&'s str, CheckpointError> {
        let has = |prefix: &str, module: &Wanted<'_>| {
            let name = join(prefix, module.rest);
            self.has(&name) || self.synonym(&name).is_some_and(|name| self.has(&name))
        };
        if group.iter().any(|module| has(prefix, module)) {
            return Ok(prefix);
        }
        let Some(first) = group.iter().find(|module| !module.may_be_new).or(group.first()) else { return Ok(prefix) };
        let rests = [Some(first.rest.to_owned()), self.synonym(first.rest)];
        let prefixes = rests.iter().flatten().filter_map(|rest| self.prefixes.get(rest.as_str())).flatten().take(MOST);
        let fits = |new: &&str| group.iter().all(|module| module.may_be_new || has(new, module));
        let mut fitting: Vec<&str> = prefixes.copied().filter(fits).collect();
        fitting.sort_unstable();
        fitting.dedup();
        let common = |new: &str| new.split('.').filter(|part| prefix.split('.').any(|p| p == *part)).count();
        let most = fitting.iter().map(|new| common(new)).max();
        let mut best = fitting.iter().filter(|new| Some(common(new)) == most);
        match (best.next(), best.next()) {
            (None, _) => {
                let all_new = group.iter().all(|module| module.may_be_new);
                if all_new { Ok(prefix) } else { Err(self.missing(first.name)) }
            }
            (Some(only), None) => Ok(only),
            (Some(one), Some(two)) => {
                let rest = first.rest;
                let reason =
                    format!("the model has {} and {}, and either may be meant", join(one, rest), join(two, rest));
                Err(CheckpointError::Unexpected { tensor: first.name.to_owned(), reason })
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

/// A module of an adapter.
struct Wanted<'n> {
    name: &'n str,
    /// The name without its prefix.
    rest: &'n str,
    may_be_new: bool,
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
