//! `rank_pattern` and `alpha_pattern`: values by regular expressions on module names.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use regex::{Regex, RegexBuilder};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::super::CheckpointError;

/// Bytes that a compiled expression may take, and all of a field together, so that a file cannot make them large. Where
/// there are so many that their shares are less than a name with a few wildcards takes, each may take that.
const SIZE_LIMIT: usize = 1 << 20;
const TOTAL_LIMIT: usize = 1 << 26;
const SIZE_OF_A_NAME: usize = 1 << 14;

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

/// Compiled expressions and their values.
#[derive(Debug, Clone)]
pub(super) struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    pub(super) const fn none() -> Self {
        Self(Vec::new())
    }

    /// Compiles the field `field`. PEFT looks for `(.*\.)?(key)$` from the start of the name on, in Python's syntax;
    /// look-around and back references, which it has besides, are an error.
    pub(super) fn compile(
        field: &str,
        entries: &Ordered,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Self, CheckpointError> {
        let error = |key: &str, expected, got| CheckpointError::Field {
            what: super::config::CONFIG.to_owned(),
            field: format!("{field}[{key:?}]"),
            expected,
            got,
        };
        let limit = (TOTAL_LIMIT / entries.0.len().max(1)).clamp(SIZE_OF_A_NAME, SIZE_LIMIT);
        let compiled = entries.0.iter().map(|(key, value)| {
            let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{key})$")).size_limit(limit).build();
            let regex = regex.map_err(|e| error(key, "a regular expression", format!("not one: {e}")))?;
            let value = convert(value).ok_or_else(|| error(key, expected, super::super::json::shown(value)))?;
            Ok((regex, value))
        });
        compiled.collect::<Result<_, _>>().map(Self)
    }

    /// The value of the first expression that matches the name of the module.
    pub(super) fn get(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
    }
}

/// The expression that matches this very module.
pub(super) fn exactly(module: &str) -> String {
    format!("^{}", regex::escape(module))
}
