//! What a command has to say, and how it reaches whoever asked.

use std::io::{self, ErrorKind, Write};

use anyhow::Result;
use serde_json::Value;

use crate::output::Sealed;
use crate::text::Text;

/// The result of a command, as text for people and as JSON for programs.
#[derive(Debug)]
pub struct Report {
    /// For people: lines, without control characters.
    pub text: String,
    /// For machines: one object.
    pub json: Value,
    /// False if the command did its work and what it found is bad: the program ends with status 3.
    pub good: bool,
}

/// A command that has done its work, and whose output, if it makes one, does not have its name yet.
///
/// Dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Prepared {
    report: Report,
    output: Option<Sealed>,
}

impl Prepared {
    /// A command without an output. `good`: nothing bad was found.
    pub(crate) fn report(text: Text, json: Value, good: bool) -> Self {
        Self { report: Report { text: text.into(), json, good }, output: None }
    }

    /// A command that made an output.
    pub(crate) fn output(output: Sealed, text: Text, json: Value) -> Self {
        Self { report: Report { text: text.into(), json, good: true }, output: Some(output) }
    }

    /// Gives the output its name; what stands there is checked again, whatever it was when the command began.
    ///
    /// # Errors
    /// Something stands there that may not be replaced, or the system refuses. Then the output is removed.
    pub fn commit(self) -> Result<Report> {
        let Self { mut report, output } = self;
        if let Some(left) = output.map(Sealed::commit).transpose()?.flatten() {
            let mut text = Text::default();
            text.line(&left);
            report.text += &String::from(text);
            report.json["left_behind"] = left.into();
        }
        Ok(report)
    }
}

/// Prints to standard output. A reader that has gone away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints a line to standard error. The status tells of a failure even if this cannot.
pub(crate) fn print_error(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
