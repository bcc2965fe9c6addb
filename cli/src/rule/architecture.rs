//! What transformers makes of each module of a model, from the table `data/architectures.json`.
//!
//! The table was made by `data/architectures.py`, which describes its fields, from the classes of transformers themselves.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::renames::{Entry, Loaded, Renames};

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../data/architectures.json")).expect("a test reads all of the table")
});

#[derive(Debug, Deserialize)]
struct Table {
    transformers: &'static str,
    types: HashMap<&'static str, [&'static str; 2]>,
    same: HashMap<&'static str, &'static str>,
    leaves: HashMap<&'static str, &'static str>,
    renames: Vec<Entry>,
    legacy: Vec<Entry>,
    classes: HashMap<&'static str, Class>,
}

/// `{parent: "child child"}`.
type Modules = HashMap<&'static str, &'static str>;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Class {
    linear: Modules,
    conv1d: Modules,
    other: Modules,
    models: BTreeMap<&'static str, Model>,
    prefix: &'static str,
    skip: Vec<&'static str>,
    head: Vec<&'static str>,
    keep: Vec<&'static str>,
    tied: bool,
    renames: Vec<usize>,
    source: &'static str,
}

/// A model within a model: its class, and the section of `config.json` that says which, if there is one.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Model {
    Fixed(&'static str),
    Configured(&'static str, &'static str),
}

/// What a module with a two-dimensional weight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `nn.Linear` itself, no subclass.
    Linear,
    /// `Conv1D`, which holds the transposed weight.
    Conv1D,
    /// An embedding, a subclass of `Linear`, a router.
    Other,
}

/// The class of a model, and what config.json says about it.
#[derive(Debug)]
pub(super) struct Architecture<'a> {
    pub(super) name: &'a str,
    class: &'static Class,
    config: &'a Map<String, Value>,
    renames: Renames,
    /// What has to be done to the names of this checkpoint, beside renames.
    shift: Shift,
}

/// The prefix of the base model, which a checkpoint may lack, or have without need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shift {
    None,
    Add,
    Strip,
}

impl<'a> Architecture<'a> {
    /// The architecture that `config.json` names, for a checkpoint with these tensors; `None` if transformers has no such
    /// class.
    pub(super) fn new<'n>(
        config: &'a Map<String, Value>,
        names: impl Iterator<Item = &'n str> + Clone,
    ) -> Result<Option<Self>> {
        let named = named(config);
        let by_type = || Some(TABLE.types.get(config.get("model_type")?.as_str()?)?[0]);
        let Some((name, class)) = named.or_else(by_type).and_then(|name| Some((name, class(name)?))) else {
            return Ok(None);
        };
        let listed = class.renames.iter().filter_map(|&at| TABLE.renames.get(at));
        let mut renames = Renames::new(listed.chain(&TABLE.legacy))?;
        renames.activate(names.clone())?;
        let mut architecture = Self { name, class, config, renames, shift: Shift::None };
        for name in names {
            let name = architecture.renames.apply(name)?.name;
            architecture.shift = architecture.shift_of(&name);
            if architecture.shift != Shift::None {
                break;
            }
        }
        Ok(Some(architecture))
    }

    /// The name that a tensor of the checkpoint has in the model.
    pub(super) fn loaded(&self, name: &str) -> Result<Loaded> {
        let mut loaded = self.renames.apply(name)?;
        if !self.knows(&loaded.name) && self.knows(name) {
            loaded = Loaded { name: name.to_owned(), converted: None };
        }
        let targets = loaded.converted.iter_mut().flatten();
        for name in targets.chain([&mut loaded.name]) {
            *name = self.shifted(name);
        }
        Ok(loaded)
    }

    fn shifted(&self, name: &str) -> String {
        let shift = match self.shift_of(name) {
            Shift::None if self.knows(name) => Shift::None,
            Shift::None => self.shift,
            shift => shift,
        };
        match shift {
            Shift::None => name.to_owned(),
            Shift::Add => format!("{}.{name}", self.class.prefix),
            Shift::Strip => inside(name, self.class.prefix).unwrap_or(name).to_owned(),
        }
    }

    fn shift_of(&self, name: &str) -> Shift {
        let prefix = self.class.prefix;
        if prefix.is_empty() {
            Shift::None
        } else if inside(name, prefix).is_some_and(|rest| self.knows(rest)) {
            Shift::Strip
        } else if self.knows(&format!("{prefix}.{name}")) {
            Shift::Add
        } else {
            Shift::None
        }
    }

    fn knows(&self, name: &str) -> bool {
        name.strip_suffix(".weight").is_some_and(|module| self.kind(module).is_some())
    }

    /// What a module is, by its name in the model; `None` if no module of this name has a two-dimensional weight.
    pub(super) fn kind(&self, module: &str) -> Option<Kind> {
        let (class, name) = self.owner(module)?;
        let is_in = |table: &Modules, name: &str| {
            let (parent, child) = name.rsplit_once('.').unwrap_or(("", name));
            table.get(parent).is_some_and(|children| children.split(' ').any(|c| c == child))
        };
        let starred = star(name);
        let kinds = [(&class.linear, Kind::Linear), (&class.conv1d, Kind::Conv1D), (&class.other, Kind::Other)];
        // A name with its numbers is in the table only if it is an exception.
        let find = |name: &str| kinds.iter().find(|(table, _)| is_in(table, name)).map(|(_, kind)| *kind);
        find(name).or_else(|| find(&starred))
    }

    /// Whether a module that [`Self::kind`] does not know is a `Linear`, because every module of its last name is one in the
    /// source of its class: some are only made with other settings.
    pub(super) fn is_linear_with_other_settings(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        let leaves = self.owner(module).and_then(|(class, _)| TABLE.leaves.get(class.source));
        leaves.is_some_and(|leaves| leaves.split(' ').any(|leaf| leaf == last))
    }

    /// The class of the innermost model that holds a module, and the module's name in there.
    fn owner<'m>(&self, module: &'m str) -> Option<(&'static Class, &'m str)> {
        let (mut class_, mut config, mut name) = (self.class, Some(self.config), module);
        'inner: loop {
            // The longest path first.
            for (path, model) in class_.models.iter().rev() {
                if let Some(rest) = inside(name, path) {
                    (class_, config) = model.resolve(config)?;
                    name = rest;
                    continue 'inner;
                }
            }
            return Some((class_, name));
        }
    }

    /// What transformers leaves by itself: its list without the output embedding, and the output embedding.
    pub(super) fn defaults(&self) -> (Vec<String>, Vec<String>) {
        let expression = |name: &&str| name.replace('*', r"\d+");
        let (head, others): (Vec<&str>, Vec<&str>) = self.class.skip.iter().partition(|s| self.class.head.contains(s));
        (others.iter().map(expression).collect(), head.iter().map(expression).collect())
    }

    /// Whether [`Self::defaults`] are as transformers has them: where it leaves a module of one layer and not of the others,
    /// they leave all of them.
    pub(super) fn is_exact(&self) -> bool {
        self.class.skip.iter().all(|entry| !entry.contains('*'))
    }

    /// What transformers leaves whatever the list says.
    pub(super) fn always(&self) -> &'static [&'static str] {
        &self.class.keep
    }

    /// Whether the output embedding has no weight of its own.
    pub(super) fn is_tied(&self) -> bool {
        let section = self.config.get("text_config").and_then(Value::as_object);
        let says =
            [Some(self.config), section].into_iter().flatten().find_map(|c| c.get("tie_word_embeddings")?.as_bool());
        says.unwrap_or(self.class.tied)
    }
}

/// The version of transformers that the table was made from.
pub(super) fn version() -> &'static str {
    TABLE.transformers
}

/// The first of `architectures`.
pub(super) fn named(config: &Map<String, Value>) -> Option<&str> {
    config.get("architectures")?.as_array()?.first()?.as_str()
}

fn class(name: &str) -> Option<&'static Class> {
    TABLE.classes.get(TABLE.same.get(name).copied().unwrap_or(name))
}

impl Model {
    /// The class, and its section of config.json.
    fn resolve<'c>(
        &self,
        config: Option<&'c Map<String, Value>>,
    ) -> Option<(&'static Class, Option<&'c Map<String, Value>>)> {
        let (default, section) = match *self {
            Self::Fixed(name) => (name, None),
            Self::Configured(name, key) => (name, config.and_then(|c| c.get(key)?.as_object())),
        };
        let other = section.and_then(|s| TABLE.types.get(s.get("model_type")?.as_str()?));
        let name = match other {
            // With a head or without, as the default has it.
            Some(classes) if !classes.contains(&default) => {
                let place = TABLE.types.values().find_map(|t| t.iter().rposition(|name| *name == default));
                place.map_or(default, |place| classes[place])
            }
            _ => default,
        };
        Some((class(name)?, section))
    }
}

/// The rest of a name inside of a path, in which `*` is any number.
fn inside<'m>(name: &'m str, path: &str) -> Option<&'m str> {
    let mut rest = name;
    for wanted in path.split('.') {
        let (part, after) = rest.split_once('.')?;
        if part != wanted && !(wanted == "*" && is_number(part)) {
            return None;
        }
        rest = after;
    }
    Some(rest)
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

/// A name with `*` for its numbers.
pub(super) fn star(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use nf4::checkpoint::SkippedModules;

    use super::*;

    /// All of the table can be used: every name leads somewhere, every expression is one.
    #[test]
    fn whole_table() {
        let table = &*TABLE;
        assert!(table.classes.len() > 1000 && table.types.len() > 300);
        for name in table.same.keys().chain(table.types.values().flatten()).chain(table.classes.keys()) {
            let class = class(name).unwrap_or_else(|| panic!("{name}"));
            assert!(class.renames.iter().all(|at| *at < table.renames.len()), "{name}");
            assert!(class.source.is_empty() || table.leaves.contains_key(class.source), "{name}");
            SkippedModules::new(
                class.skip.iter().map(|s| s.replace('*', r"\d+")).chain(class.keep.iter().map(|&s| s.to_owned())),
            )
            .unwrap_or_else(|e| panic!("{name}: {e}"));
            for model in class.models.values() {
                assert!(model.resolve(None).is_some(), "{name}: {model:?}");
            }
        }
        Renames::new(table.renames.iter().chain(&table.legacy)).unwrap();
        for entry in &table.renames {
            let (Entry::Everywhere(_, targets, _) | Entry::Within(_, targets, ..)) = entry;
            assert!(!targets.is_empty() && !targets.iter().any(|t| t.contains(r"\2")), "{entry:?}");
        }
    }

    #[test]
    fn paths() {
        assert_eq!(inside("model.layers.3.mlp.up", "model.layers.*"), Some("mlp.up"));
        assert_eq!(inside("model.layers.x.mlp", "model.layers.*"), None);
        assert_eq!(inside("model", "model"), None);
        assert_eq!(inside("models.a", "model"), None);
        assert_eq!(star("model.layers.31.mlp.0"), "model.layers.*.mlp.*");
    }
}
