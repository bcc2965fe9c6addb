//! `rank_pattern` and `alpha_pattern`: values by regular expressions on module names.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use regex::{Regex, RegexBuilder};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::super::error::CheckpointError;
use super::super::json::{shortened, shown};

/// Bytes that a compiled expression may take, and all of a field together, so that a file cannot make them large.
const SIZE_LIMIT: usize = 1 << 20;
const TOTAL_LIMIT: usize = 1 << 26;
/// Expressions of a field: with more of them, the share of each would be less than a name with a few wildcards takes.
const COUNT_LIMIT: usize = TOTAL_LIMIT >> 14;
/// Bytes of the text of an expression, which is parsed before any other limit holds: a class of two letters stands for
/// hundreds of ranges.
const TEXT_LIMIT: usize = 1 << 12;

/// The product of the sizes of all compiled expressions and of the letters of all names that they are matched with: without
/// a limit each is small enough, and a match takes time in proportion to both. The largest takes seconds.
pub(super) const WORK_LIMIT: usize = if usize::BITS > 32 { 1 << 33 } else { usize::MAX };

/// The work of comparing two names, most of which differ in the first letters.
const NAME_WORK: usize = 2;

/// A JSON object whose order is kept: the first expression that matches counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ordered(pub(super) Vec<(String, Value)>);

impl Serialize for Ordered {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Ordered;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or null")
            }
            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_any(InOrder)
    }
}

/// A key of a field.
#[derive(Debug, Clone)]
enum Pattern {
    Name(Name),
    Expression(Regex),
}

impl Pattern {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => name.matches(module),
            Self::Expression(regex) => regex.is_match(module),
        }
    }
}

/// An expression that is a name or the end of one, as most are: it is compared, and takes four bytes a character.
#[derive(Debug, Clone)]
struct Name {
    /// Whether it is the whole name: `^`.
    whole: bool,
    /// The characters; `None` for a dot, which stands for any but a line feed.
    chars: Box<[Option<char>]>,
}

impl Name {
    /// The name that a key is, if it is one: letters, digits, `_` and `-`, dots, and punctuation after a backslash.
    fn parse(key: &str) -> Option<Self> {
        let rest = key.strip_prefix('^');
        let mut letters = rest.unwrap_or(key).chars();
        let mut chars = Vec::new();
        while let Some(letter) = letters.next() {
            chars.push(match letter {
                '.' => None,
                '\\' => Some(letters.next().filter(char::is_ascii_punctuation)?),
                '_' | '-' => Some(letter),
                _ if letter.is_alphanumeric() => Some(letter),
                _ => return None,
            });
        }
        Some(Self { whole: rest.is_some(), chars: chars.into_boxed_slice() })
    }

    /// As the expression `^(?:.*\.)?(?:name)$`.
    fn matches(&self, module: &str) -> bool {
        let mut letters = module.chars().rev();
        let fits = |c: &Option<char>| letters.next().is_some_and(|letter| c.map_or(letter != '\n', |c| c == letter));
        if !self.chars.iter().rev().all(fits) {
            return false;
        }
        match letters.next() {
            None => true,
            Some(before) => before == '.' && !self.whole && letters.all(|letter| letter != '\n'),
        }
    }
}

/// The keys of a field, to be matched, and their values.
#[derive(Debug, Clone)]
pub(super) struct Patterns<T> {
    entries: Vec<(Pattern, T)>,
    /// Bytes that the expressions among them take, by a bound that is at most four times too large.
    size: usize,
}

impl<T: Copy> Patterns<T> {
    pub(super) const fn none() -> Self {
        Self { entries: Vec::new(), size: 0 }
    }

    /// Compiles the field `field`. PEFT looks for `(.*\.)?(key)$` from the start of the name on, in Python's syntax;
    /// look-around and back references, which it has besides, are an error.
    pub(super) fn compile(
        field: &str,
        entries: &Ordered,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Self, CheckpointError> {
        let error =
            |field, expected, got| CheckpointError::Field { what: super::CONFIG.to_owned(), field, expected, got };
        let count = entries.0.iter().filter(|(key, _)| Name::parse(key).is_none()).count();
        if count > COUNT_LIMIT {
            let expected = "names and at most 4096 other regular expressions";
            return Err(error(field.to_owned(), expected, format!("an object with {count} of these")));
        }
        let limit = SIZE_LIMIT.min(TOTAL_LIMIT / count.max(1));
        let mut size = 0_usize;
        let compiled = entries.0.iter().map(|(key, value)| {
            let at = || format!("{field}[{:?}]", shortened(key));
            let value = convert(value).ok_or_else(|| error(at(), expected, shown(value)))?;
            if let Some(name) = Name::parse(key) {
                return Ok((Pattern::Name(name), value));
            }
            if key.len() > TEXT_LIMIT {
                let expected = "a name or a regular expression of at most 4096 bytes";
                return Err(error(at(), expected, format!("{} bytes long", key.len())));
            }
            let (regex, bytes) = compile(&format!(r"^(?:.*\.)?(?:{key})$"), limit)
                .map_err(|e| error(at(), "a regular expression", format!("not one: {e}")))?;
            size = size.saturating_add(bytes);
            Ok((Pattern::Expression(regex), value))
        });
        let entries = compiled.collect::<Result<_, _>>()?;
        Ok(Self { entries, size })
    }

    /// The cost of looking for `modules` modules whose names have `letters` letters together, in units of [`WORK_LIMIT`].
    pub(super) fn work(&self, modules: usize, letters: usize) -> usize {
        let names = self.entries.len().saturating_mul(modules).saturating_mul(NAME_WORK);
        self.size.saturating_mul(letters).saturating_add(names)
    }

    /// The value of the first expression that matches the name of the module.
    pub(super) fn get(&self, module: &str) -> Option<T> {
        self.entries.iter().find(|(pattern, _)| pattern.matches(module)).map(|(_, value)| *value)
    }
}

/// Compiles an expression, and returns a limit that its size keeps: the first of 1 KiB, 4 KiB and so on that does.
fn compile(text: &str, limit: usize) -> Result<(Regex, usize), regex::Error> {
    let mut size = 1 << 10;
    loop {
        match RegexBuilder::new(text).size_limit(size.min(limit)).build() {
            Ok(regex) => return Ok((regex, size.min(limit))),
            Err(regex::Error::CompiledTooBig(_)) if size < limit => size *= 4,
            Err(error) => return Err(error),
        }
    }
}

/// The expression that matches this very module.
pub(super) fn exactly(module: &str) -> String {
    format!("^{}", regex::escape(module))
}
