//! What a run says of itself: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// A line for each of these many steps where there is no terminal.
const EVERY: usize = 10;

pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    tokens: usize,
    done: usize,
    left: usize,
}

impl Progress {
    /// For a run that has made `done` of `all` steps.
    pub(crate) fn new(done: usize, all: usize) -> Result<Self> {
        let bar = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(all as u64).with_position(done as u64);
            bar.set_style(ProgressStyle::with_template("step {pos}/{len} {bar:30} {msg}")?);
            bar.reset_eta();
            Some(bar)
        } else {
            None
        };
        Ok(Self { bar, start: Instant::now(), tokens: 0, done: 0, left: all - done })
    }

    /// After a step on `tokens` tokens.
    pub(crate) fn step(&mut self, step: usize, tokens: usize, loss: f64, rate: f64) {
        self.tokens += tokens;
        self.done += 1;
        self.left = self.left.saturating_sub(1);
        let seconds = self.start.elapsed().as_secs_f64();
        let left = Duration::from_secs_f64(seconds / self.done as f64 * self.left as f64);
        let speed = self.tokens as f64 / seconds.max(1e-9);
        let message = format!("loss {loss:.4}, {speed:.0} tokens/s, {} left", HumanDuration(left));
        match &self.bar {
            Some(bar) => {
                bar.set_position(step as u64);
                bar.set_message(message);
            }
            None if step.is_multiple_of(EVERY) || self.left == 0 => {
                eprintln!("step {step}: {message}, learning rate {rate:.2e}");
            }
            None => {}
        }
    }

    /// A line that stays.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Does not count the time that `f` takes.
    pub(crate) fn aside<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = f();
        self.start += start.elapsed();
        result
    }
}
