//! Fields of JSON objects, with errors that name them, and numbers as Python writes them.

use alloc::borrow::{Cow, ToOwned};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde_json::{Map, Value};

use super::error::CheckpointError;

/// A parsed object and what holds it.
#[derive(Debug)]
pub(super) struct Object<'a> {
    what: &'a str,
    fields: Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(super) fn parse(what: &'a str, json: &[u8]) -> Result<Self, CheckpointError> {
        let fail = |reason: String| CheckpointError::Json { what: what.to_owned(), reason };
        match serde_json::from_slice(json) {
            Ok(Value::Object(fields)) => Ok(Self { what, fields }),
            Ok(_) => Err(fail("expected a JSON object".to_owned())),
            // Python writes them, though JSON does not have them.
            Err(error) if ["NaN", "Infinity"].iter().any(|word| contains(json, word)) => {
                Err(fail(format!("{error}; the text holds NaN or Infinity, which are not JSON")))
            }
            Err(error) => Err(fail(error.to_string())),
        }
    }

    /// As [`Self::parse`], of a text that Python wrote; see [`from_python`].
    pub(super) fn parse_python(what: &'a str, json: &[u8]) -> Result<Self, CheckpointError> {
        Self::parse(what, &from_python(json))
    }

    pub(super) fn from_fields(what: &'a str, fields: Map<String, Value>) -> Self {
        Self { what, fields }
    }

    pub(super) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    pub(super) fn into_fields(self) -> Map<String, Value> {
        self.fields
    }

    /// The value of a field; `None` if it is missing or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// The value of a field that must be there and that `convert` must take.
    pub(super) fn require<'s, T>(
        &'s self,
        field: &str,
        expected: &'static str,
        convert: impl FnOnce(&'s Value) -> Option<T>,
    ) -> Result<T, CheckpointError> {
        let value = self.fields.get(field);
        value.and_then(convert).ok_or_else(|| self.error(field, expected))
    }

    /// As [`Self::require`], or the default if the field is missing or null.
    pub(super) fn optional<'s, T>(
        &'s self,
        field: &str,
        expected: &'static str,
        default: T,
        convert: impl FnOnce(&'s Value) -> Option<T>,
    ) -> Result<T, CheckpointError> {
        self.get(field).map_or(Ok(default), |value| convert(value).ok_or_else(|| self.error(field, expected)))
    }

    /// The error that a field has a value that it cannot have.
    pub(super) fn error(&self, field: &str, expected: &'static str) -> CheckpointError {
        let got = self.fields.get(field).map_or("missing".to_owned(), shown);
        CheckpointError::Field { what: self.what.to_owned(), field: field.to_owned(), expected, got }
    }
}

/// A value for a message, not longer than a line.
pub(super) fn shown(value: &Value) -> String {
    shortened(&value.to_string())
}

/// A text for a message, not longer than a line.
pub(super) fn shortened(text: &str) -> String {
    if text.chars().nth(80).is_none() { text.to_owned() } else { text.chars().take(80).chain("...".chars()).collect() }
}

pub(super) fn to_usize(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

/// A list of strings.
pub(super) fn to_strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

/// A finite number as Python's `repr` writes it, and so its `json`: the shortest digits that give it back; an exponent
/// of two digits or more below 1e-4 and from 1e16 on.
pub(super) fn python_float(x: f64) -> String {
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// How the string begins that takes the place of a number that JSON does not have.
const MARK: &str = "\"\\u0000python:";

/// The numbers that Python's `json` writes and JSON does not have.
const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// A text that Python wrote, as JSON: its infinities and NaN become strings that [`to_python`] turns back.
pub(super) fn from_python(text: &[u8]) -> Cow<'_, [u8]> {
    if !NUMBERS.iter().any(|word| contains(text, word)) {
        return Cow::Borrowed(text);
    }
    let (mut json, mut rest, mut in_string) = (Vec::with_capacity(text.len()), text, false);
    while let Some((&byte, after)) = rest.split_first() {
        let number = NUMBERS.iter().find(|word| !in_string && rest.starts_with(word.as_bytes()));
        if let Some(word) = number {
            json.extend_from_slice(format!("{MARK}{word}\"").as_bytes());
            rest = &rest[word.len()..];
            continue;
        }
        json.push(byte);
        rest = after;
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => {
                if let Some((&escaped, after)) = rest.split_first() {
                    json.push(escaped);
                    rest = after;
                }
            }
            _ => {}
        }
    }
    Cow::Owned(json)
}

/// JSON with the numbers that [`from_python`] had replaced.
pub(super) fn to_python(json: String) -> String {
    if !json.contains(MARK) {
        return json;
    }
    NUMBERS.iter().fold(json, |json, word| json.replace(&format!("{MARK}{word}\""), word))
}

fn contains(text: &[u8], word: &str) -> bool {
    text.windows(word.len()).any(|window| window == word.as_bytes())
}
