//! How transformers renames the tensors of a checkpoint when it loads them.
//!
//! A model has a list of renames, each a search for a regular expression of which the first match is replaced; all of them
//! are applied in turn. After them comes at most one conversion, which also changes tensors: experts are joined, a fused
//! projection is cut, rows are permuted (`WeightTransform` in `core_model_loading.py`).

use anyhow::{Context, Result};
use fancy_regex::Regex;
use serde::Deserialize;

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Rename,
    /// Several renames, each with a target of its own, which apply if the first one matches any tensor of the model.
    Group,
    Convert,
}

/// A step as the table has it: sources, targets, kind, and for a model within the model its path and the prefix that the
/// path may lack.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Entry {
    Everywhere(Vec<String>, Vec<String>, Kind),
    Within(Vec<String>, Vec<String>, Kind, String, String),
}

/// The name of a tensor in the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loaded {
    pub(super) name: String,
    /// The names of what it is converted to, if it is.
    pub(super) converted: Option<Vec<String>>,
}

/// All steps of a model.
#[derive(Debug, Default)]
pub(super) struct Renames {
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    expression: Regex,
    targets: Vec<String>,
    kind: Kind,
    /// Prefixes of the names that it is applied to, the first one that fits.
    scopes: Vec<String>,
    active: bool,
}

impl Renames {
    /// The steps of a model, in order.
    pub(super) fn new<'e>(entries: impl Iterator<Item = &'e Entry>) -> Result<Self> {
        Ok(Self { steps: entries.map(Step::new).collect::<Result<_>>()? })
    }

    /// Looks which groups apply to the tensors of a model.
    pub(super) fn activate<'a>(&mut self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        for at in 0..self.steps.len() {
            if self.steps[at].kind != Kind::Group {
                continue;
            }
            for name in names.clone() {
                let mut name = name.to_owned();
                for step in self.steps[..at].iter().filter(|s| s.kind != Kind::Convert) {
                    name = step.rename(&name)?.map_or(name, |mut names| names.swap_remove(0));
                }
                if self.steps[at].find(&name)?.is_some_and(|found| found.source == 0) {
                    self.steps[at].active = true;
                    break;
                }
            }
        }
        Ok(())
    }

    /// The name of a tensor in the model.
    pub(super) fn apply(&self, name: &str) -> Result<Loaded> {
        let mut name = name.to_owned();
        for step in self.steps.iter().filter(|s| s.kind != Kind::Convert) {
            name = step.rename(&name)?.map_or(name, |mut names| names.swap_remove(0));
        }
        for step in self.steps.iter().filter(|s| s.kind == Kind::Convert) {
            if let Some(names) = step.rename(&name)? {
                return Ok(Loaded { name: names[0].clone(), converted: Some(names) });
            }
        }
        Ok(Loaded { name, converted: None })
    }
}

/// Where a step matched.
struct Found<'a> {
    /// The prefix that the step does not see.
    scope: &'a str,
    rest: &'a str,
    text: &'a str,
    /// Which of the sources matched.
    source: usize,
    /// What its own group matched, if it has one.
    group: &'a str,
}

impl Step {
    fn new(entry: &Entry) -> Result<Self> {
        let (sources, targets, kind, scopes) = match entry {
            Entry::Everywhere(sources, targets, kind) => (sources, targets, *kind, vec![String::new()]),
            Entry::Within(sources, targets, kind, path, prefix) => {
                let dotted = |part: &String| if part.is_empty() { String::new() } else { format!("{part}.") };
                (sources, targets, *kind, vec![dotted(prefix) + &dotted(path), dotted(path)])
            }
        };
        // Longest first: a name is matched by the first branch.
        let mut order: Vec<usize> = (0..sources.len()).collect();
        order.sort_by_key(|&i| core::cmp::Reverse(sources[i].chars().count()));
        let branches: Vec<String> = order.iter().map(|&i| format!("(?P<g{i}>{})", branch(&sources[i]))).collect();
        let expression = Regex::new(&branches.join("|")).with_context(|| format!("{sources:?}"))?;
        Ok(Self { expression, targets: targets.clone(), kind, scopes, active: kind != Kind::Group })
    }

    fn find<'a>(&self, name: &'a str) -> Result<Option<Found<'a>>> {
        let Some(rest) = self.scopes.iter().find_map(|scope| name.strip_prefix(&**scope)) else { return Ok(None) };
        let Some(found) = self.expression.captures(rest)? else { return Ok(None) };
        let names = self.expression.capture_names().enumerate();
        let matched = names.filter_map(|(at, name)| Some((at, name?.strip_prefix('g')?.parse().ok()?)));
        let Some((at, source)) = matched.into_iter().find(|&(at, _): &(usize, usize)| found.get(at).is_some()) else {
            return Ok(None);
        };
        let text = found.get(0).map_or("", |m| m.as_str());
        let group = found.get(at + 1).map_or("", |m| m.as_str());
        Ok(Some(Found { scope: &name[..name.len() - rest.len()], rest, text, source, group }))
    }

    /// The names with each of the targets, if the step applies; at least one.
    fn rename(&self, name: &str) -> Result<Option<Vec<String>>> {
        let Some(Found { scope, rest, text, source, group }) = self.find(name)? else { return Ok(None) };
        if !self.active {
            return Ok(None);
        }
        let targets = if self.kind == Kind::Group { &self.targets[source..=source] } else { &self.targets };
        let replace = |target: &String| scope.to_owned() + &rest.replacen(text, &target.replace(r"\1", group), 1);
        Ok(Some(targets.iter().map(replace).collect()))
    }
}

/// The expression of a source: `*` is any text, and the source ends where a name ends.
fn branch(source: &str) -> String {
    let mut branch = source.replace("*.", r".*\.");
    if branch.ends_with(|c: char| c.is_ascii_alphanumeric()) {
        branch += r"(?!\w)";
    }
    branch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renames(json: &str) -> Renames {
        let entries: Vec<Entry> = serde_json::from_str(json).unwrap();
        Renames::new(entries.iter()).unwrap()
    }

    fn named(name: &str) -> Loaded {
        Loaded { name: name.to_owned(), converted: None }
    }

    /// What `rename_source_key` of transformers 5.23 makes of these names.
    #[test]
    fn as_transformers() {
        let mixtral = renames(
            r#"[[["\\.block_sparse_moe\\."], [".mlp."], "rename"],
                [["\\.experts\\.*.w1.weight", "\\.experts\\.*.w3.weight"], [".experts.gate_up_proj"], "convert"],
                [["\\.qkv\\.weight"], [".q.weight", ".k.weight"], "convert"]]"#,
        );
        let apply = |name| mixtral.apply(name).unwrap();
        assert_eq!(apply("layers.0.block_sparse_moe.gate.weight"), named("layers.0.mlp.gate.weight"));
        let fused = apply("layers.0.block_sparse_moe.experts.3.w3.weight");
        assert_eq!(fused.name, "layers.0.mlp.experts.gate_up_proj");
        assert_eq!(apply("a.qkv.weight").converted.unwrap(), ["a.q.weight", "a.k.weight"]);
        // A source ends where a name does.
        assert_eq!(apply("a.qkv.weight_scale"), named("a.qkv.weight_scale"));

        let prefix =
            renames(r#"[[["^model(?!\\.visual)"], ["model.text"], "rename"], [["^(?!model)"], ["base."], "rename"]]"#);
        assert_eq!(prefix.apply("model.layers.0").unwrap(), named("model.text.layers.0"));
        assert_eq!(prefix.apply("model.visual.0").unwrap(), named("model.visual.0"));
        assert_eq!(prefix.apply("layers.0").unwrap(), named("base.layers.0"));

        let group = renames(r#"[[["x\\.(\\d+)\\.fc1"], ["y.\\1.out"], "rename", "tower", "model"]]"#);
        assert_eq!(group.apply("model.tower.x.5.fc1.weight").unwrap(), named("model.tower.y.5.out.weight"));
        assert_eq!(group.apply("tower.x.5.fc1.weight").unwrap(), named("tower.y.5.out.weight"));
        assert_eq!(group.apply("x.5.fc1.weight").unwrap(), named("x.5.fc1.weight"));
    }

    /// Two renames of which the first one's result looks like the second one's source.
    #[test]
    fn groups() {
        let json = r#"[[["norm0", "norm1"], ["norm1", "norm2"], "group"]]"#;
        let mut old = renames(json);
        old.activate(["a.norm0.weight", "a.norm1.weight"].into_iter()).unwrap();
        assert_eq!(old.apply("a.norm0.weight").unwrap(), named("a.norm1.weight"));
        assert_eq!(old.apply("a.norm1.weight").unwrap(), named("a.norm2.weight"));
        let mut new = renames(json);
        new.activate(["a.norm1.weight", "a.norm2.weight"].into_iter()).unwrap();
        assert_eq!(new.apply("a.norm1.weight").unwrap(), named("a.norm1.weight"));
    }
}
