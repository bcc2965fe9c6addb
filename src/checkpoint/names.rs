//! Names of modules and tensors: parts with dots between them.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;

/// `prefix.name`, or only the name in a file with one layer.
pub(super) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// The module of a tensor `module.part`; it is empty in a file with one layer.
pub(super) fn module_of<'n>(name: &'n str, part: &str) -> Option<&'n str> {
    let rest = name.strip_suffix(part)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

/// The last part of a name.
pub(super) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Values by names that stand for every name that ends with them. A lookup takes as long for many as for few.
#[derive(Debug, Clone)]
pub(super) struct Ends<'a, T> {
    values: BTreeMap<&'a str, T>,
    lens: BTreeSet<usize>,
}

impl<'a, T> Ends<'a, T> {
    /// Of names that stand twice the last one counts.
    pub(super) fn new(entries: impl Iterator<Item = (&'a str, T)>) -> Self {
        let values: BTreeMap<&str, T> = entries.collect();
        let lens = values.keys().map(|name| name.len()).collect();
        Self { values, lens }
    }

    /// The values of all ends of a name that are the whole of it or begin after a dot.
    pub(super) fn of<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'s T> + 's {
        self.anywhere(name).filter(|(start, _)| *start == 0 || name[..*start].ends_with('.')).map(|(_, value)| value)
    }

    /// The values of all ends of a name, with the places where they begin.
    pub(super) fn anywhere<'s>(&'s self, name: &'s str) -> impl Iterator<Item = (usize, &'s T)> + 's {
        self.lens.range(..=name.len()).filter_map(|len| {
            let start = name.len() - len;
            Some((start, self.values.get(name.get(start..)?)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn ends() {
        let ends = Ends::new([("q", 0), ("attn.q", 1), ("é.q", 2), ("k", 3), ("", 4)].into_iter());
        let of = |name| ends.of(name).copied().collect::<Vec<_>>();
        assert_eq!(of("attn.q"), [0, 1]);
        assert_eq!(of("é.q"), [0, 2]);
        assert_eq!(of("xé.q"), [0]);
        assert!(of("xq").is_empty());
        assert_eq!(of("x."), [4]);
        assert_eq!(of(""), [4]);
        assert_eq!(ends.anywhere("xq").collect::<Vec<_>>(), [(2, &4), (1, &0)]);
        let ends_with =
            |name: &str, end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        for name in ["attn.q", "xattn.q", "é.q", "xq", "", "."] {
            for (end, value) in &ends.values {
                assert_eq!(of(name).contains(value), ends_with(name, end), "{name} {end}");
            }
        }
    }
}
