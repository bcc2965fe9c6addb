//! Text for people. Names and messages come from files, which may be hostile: nothing in them controls the terminal, and
//! nothing forges a line.

use core::fmt::{Display, Write};

/// The most characters of a line, and of a cell of a table. JSON has all.
const LINE: usize = 4000;
const CELL: usize = 300;

/// Lines of text. Whatever is put in a line stays in it, as printable characters.
#[derive(Debug, Default)]
pub(crate) struct Text(String);

impl Text {
    /// Adds a line.
    pub(crate) fn line(&mut self, line: impl Display) -> &mut Self {
        self.0 += &printable(&line.to_string(), LINE);
        self.0.push('\n');
        self
    }

    /// Adds a table whose columns are aligned: the first to the left, the others to the right.
    pub(crate) fn table(&mut self, rows: &[Vec<String>]) -> &mut Self {
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(|cell| printable(cell, CELL)).collect()).collect();
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &rows {
            let mut line = String::new();
            for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                line += &if c == 0 { format!("{cell:width$}") } else { format!("  {cell:>width$}") };
            }
            self.0 += line.trim_end();
            self.0.push('\n');
        }
        self
    }
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        text.0
    }
}

/// What a terminal shows as it stands: other characters become escapes such as `\n` and `\u{1b}`, and of a text that is longer
/// than `most` characters the beginning and the length are left.
pub(crate) fn printable(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for c in text.chars().take(most) {
        if is_printable(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    let length = text.chars().count();
    if length > most {
        shown += &format!("... ({length} characters)");
    }
    shown
}

/// As [`printable`], for a whole message, which is one line.
pub(crate) fn message(message: impl Display) -> String {
    printable(&message.to_string(), LINE)
}

/// Neither a control character nor one that changes the direction of what follows or ends a line.
fn is_printable(c: char) -> bool {
    let is_layout =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !is_layout
}

/// JSON text in which no character but the line feed is one that a terminal does not show as it stands.
pub(crate) fn json(value: &serde_json::Value) -> String {
    // All other control characters are in strings, where JSON itself escapes only some of them.
    let mut text = String::new();
    for c in format!("{value:#}\n").chars() {
        if c == '\n' || is_printable(c) {
            text.push(c);
        } else {
            // They are all in the basic plane.
            write!(text, "\\u{:04x}", u32::from(c)).unwrap_or_default();
        }
    }
    text
}

/// A number of bytes: `123 B`, `12.3 MB`; powers of 1000.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let value = n as f64;
    let unit = units.into_iter().find(|(size, _)| value >= *size);
    unit.map_or_else(|| format!("{n} B"), |(size, name)| format!("{:.1} {name}", value / size))
}

/// A shape: `4096 x 11008`; of one with many dimensions the first ones.
pub(crate) fn shape(dims: &[usize]) -> String {
    const MOST: usize = 8;
    match dims {
        [] => "scalar".to_owned(),
        _ if dims.len() > MOST => format!("{} x ... ({} dimensions)", shape(&dims[..MOST]), dims.len()),
        _ => dims.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\u{1b}]52;c;ZXZpbA==\u{7}\nb\r\u{9b}31m\u{7f}\t\u{202e}c\u{2028}\u{2066}";

    #[test]
    fn nothing_leaves_its_line() {
        let mut text = Text::default();
        text.line(HOSTILE)
            .table(&[vec!["name".to_owned(), "size".to_owned()], vec![HOSTILE.to_owned(), "1".to_owned()]]);
        let text = String::from(text);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.chars().all(|c| c == '\n' || is_printable(c)), "{text:?}");
        assert!(
            text.starts_with(r"a\u{1b}]52;c;ZXZpbA==\u{7}\nb\r\u{9b}31m\u{7f}\t\u{202e}c\u{2028}\u{2066}"),
            "{text}"
        );
        assert_eq!(message("größe_重み 'x' \\"), "größe_重み 'x' \\");
    }

    #[test]
    fn json_stays_what_it_was() {
        let value = serde_json::json!({ HOSTILE: [HOSTILE, "重み"] });
        let text = json(&value);
        assert!(text.chars().all(|c| c == '\n' || is_printable(c)), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn length() {
        assert_eq!(printable(&"ä".repeat(10), 10), "ä".repeat(10));
        assert_eq!(printable(&"ä".repeat(11), 10), format!("{}... (11 characters)", "ä".repeat(10)));
        assert_eq!(shape(&[1; 8]), "1 x 1 x 1 x 1 x 1 x 1 x 1 x 1");
        assert_eq!(shape(&[2; 1_000_000]), "2 x 2 x 2 x 2 x 2 x 2 x 2 x 2 x ... (1000000 dimensions)");
        assert_eq!([shape(&[]), shape(&[3])], ["scalar", "3"]);
        assert_eq!([bytes(999), bytes(1000), bytes(12_345_678)], ["999 B", "1.0 kB", "12.3 MB"]);
    }
}
