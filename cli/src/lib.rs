//! The command-line tool `nf4` as a library: inspects, quantizes, dequantizes, merges and verifies model files, and
//! measures this machine.
//!
//! The program itself is [`main`]. Other programs parse a command line with `clap`'s traits and run it:
//!
//! ```
//! use clap::Parser;
//! use nf4_cli::{Cli, Report};
//!
//! let cli = Cli::try_parse_from(["nf4", "bench", "--shape", "64x64", "--rounds", "1"])?;
//! let Report { json, good, .. } = cli.run()?;
//! assert!(good && json["results"].is_array());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![allow(clippy::std_instead_of_alloc, clippy::std_instead_of_core, reason = "a program, which has std")]
#![allow(clippy::doc_markdown, reason = "comments on commands and options are their help texts")]

mod adapters;
mod bench;
mod build;
mod dequantize;
mod flat;
#[allow(dead_code, reason = "the tests use more of it")]
mod generator;
mod hub;
mod inputs;
mod inspect;
mod interrupt;
mod io;
mod layers;
mod memory;
mod merge;
mod model;
mod output;
mod place;
mod planned;
mod progress;
mod quantize;
mod rename;
mod report;
mod rule;
mod selftest;
mod shard;
mod staging;
mod text;
#[allow(dead_code, reason = "the tests use more of it")]
mod vector;
mod verify;
mod workers;
mod writer;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use serde_json::json;

pub use crate::report::{Prepared, Report};

/// 4-bit NormalFloat (NF4) weights and QLoRA adapters in safetensors files.
///
/// Works on single files and on whole model directories: `config.json`, and `model.safetensors` or shards with
/// `model.safetensors.index.json`. Tensors are streamed, so a model need not fit in memory.
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

const EXIT_CODES: &str = "\
Exit status:
  0    done
  1    failed; standard error says which file and tensor, and why. No output appears under its name
  2    the command line is wrong
  3    `verify`, `inspect` or `selftest` did its work and found something wrong
  130  interrupted; the unfinished output is removed";

/// What every command takes.
#[derive(Debug, Args)]
struct Global {
    /// Print one JSON object on standard output instead of text; on failure {"error": "..."}
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress bar; there is none either if standard error is not a terminal
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Threads to work with; 0 means one per processor
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(inspect::Inspect),
    Quantize(quantize::Quantize),
    Dequantize(dequantize::Dequantize),
    Merge(merge::Merge),
    Verify(verify::Verify),
    Bench(bench::Bench),
    Selftest(selftest::Selftest),
}

impl Command {
    fn prepare(&self, global: &Global) -> Result<Prepared> {
        match self {
            Self::Inspect(command) => command.run(),
            Self::Quantize(command) => command.run(global),
            Self::Dequantize(command) => command.run(global),
            Self::Merge(command) => command.run(global),
            Self::Verify(command) => command.run(global),
            Self::Bench(command) => command.run(),
            Self::Selftest(command) => command.run(),
        }
    }
}

impl Cli {
    /// Does all the work of the command, except giving the output its name.
    ///
    /// # Errors
    /// Whatever makes the program end with status 1: the message names the file, the tensor and the numbers.
    pub fn prepare(&self) -> Result<Prepared> {
        self.command.prepare(&self.global)
    }

    /// Runs the command: [`Self::prepare`] and [`Prepared::commit`].
    ///
    /// # Errors
    /// The errors of both.
    pub fn run(&self) -> Result<Report> {
        self.prepare()?.commit()
    }
}

/// Runs the command line of this process; see `nf4 --help`.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = interrupt::handle().and_then(|()| cli.run());
    let (output, status) = match &result {
        Ok(Report { text, json, good }) => {
            let output = if cli.global.json { text::json(json) } else { text.clone() };
            (output, if *good { 0 } else { 3 })
        }
        Err(error) => {
            let message = text::message(format_args!("{error:#}"));
            report::print_error(&format!("nf4: {message}"));
            (if cli.global.json { text::json(&json!({ "error": message })) } else { String::new() }, 1)
        }
    };
    printed(report::print(&output), status)
}

/// Prints help, version, or what is wrong with the command line.
fn usage(error: &clap::Error) -> ExitCode {
    let status = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.print() {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::from(status),
        result => printed(result, status),
    }
}

/// The status, unless the result that it stands for could not be told.
fn printed(result: std::io::Result<()>, status: u8) -> ExitCode {
    match result {
        Ok(()) => ExitCode::from(status),
        Err(error) => {
            report::print_error(&format!("nf4: cannot write the result: {error}"));
            ExitCode::FAILURE
        }
    }
}
