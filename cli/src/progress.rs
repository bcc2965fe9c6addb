//! Progress on standard error; nothing if that is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::text::printable;

/// A bar that counts bytes.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar for `bytes` of work, hidden if `quiet` or if standard error is not a terminal.
    pub(crate) fn new(what: &'static str, bytes: u64, quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
        let template = "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Self(bar)
    }

    /// Names what is being worked on.
    pub(crate) fn at(&self, tensor: &str) {
        self.0.set_message(printable(tensor, 200));
    }

    /// Counts bytes that are done.
    pub(crate) fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
