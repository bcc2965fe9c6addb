//! What a command prints: text for people, or one JSON object for machines.

use std::io::Write;

use serde_json::Value;

/// The result of a command.
#[derive(Debug)]
pub struct Report {
    /// For people: lines.
    pub text: String,
    /// For machines: one object.
    pub json: Value,
    /// False if the command did its work and what it found is bad: the program ends with status 3.
    pub good: bool,
}

impl Report {
    /// A result with nothing bad in it.
    pub(crate) fn good(text: String, json: Value) -> Self {
        Self { text, json, good: true }
    }
}

/// Prints to standard output. A reader that has gone away (`| head`) is no failure.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// A table whose columns are aligned: the first to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            line += &if c == 0 { format!("{cell:width$}") } else { format!("  {cell:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A number of bytes, for people: `123 B`, `12.3 MB`; powers of 1000.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let value = n as f64;
    let unit = units.into_iter().find(|(size, _)| value >= *size);
    unit.map_or_else(|| format!("{n} B"), |(size, name)| format!("{:.1} {name}", value / size))
}

/// A shape, for people: `4096 x 11008`.
pub(crate) fn shape(dims: &[usize]) -> String {
    let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
    if dims.is_empty() { "scalar".to_owned() } else { dims.join(" x ") }
}
