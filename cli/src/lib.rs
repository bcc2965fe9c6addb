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
//! let Report { json, good, .. } = nf4_cli::run(&cli)?;
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
mod floats;
mod inspect;
mod io;
mod layers;
mod merge;
mod model;
mod output;
mod progress;
mod quantize;
mod report;
mod rows;
mod rule;
mod shard;
mod verify;
mod workers;
mod writer;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use serde_json::json;

pub use crate::report::Report;

/// 4-bit NormalFloat (NF4) weights and QLoRA adapters in safetensors files.
///
/// Works on single files and on whole model directories: `config.json`, and `model.safetensors` or shards with
/// `model.safetensors.index.json`. Tensors are streamed: a model need not fit in memory.
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
  1    failed; standard error says which file and tensor, and why. Nothing is left under the name of the output
  2    the command line is wrong
  3    `verify` or `inspect` did its work and found something wrong
  130  interrupted; what was unfinished is removed";

/// What every command takes.
#[derive(Debug, Args)]
struct Global {
    /// Print one JSON object on standard output, in place of text; on failure {"error": "..."}
    #[arg(long, global = true)]
    json: bool,
    /// No progress bar (there is none either if standard error is not a terminal)
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Threads to work with; 0: as many as there are processors
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
}

impl Command {
    fn run(&self, global: &Global) -> Result<Report> {
        match self {
            Self::Inspect(command) => command.run(),
            Self::Quantize(command) => command.run(global),
            Self::Dequantize(command) => command.run(global),
            Self::Merge(command) => command.run(global),
            Self::Verify(command) => command.run(global),
            Self::Bench(command) => command.run(),
        }
    }
}

/// Runs a command line, and returns what it has to say.
///
/// # Errors
/// Whatever makes the program end with status 1: the message names the file, the tensor and the numbers.
pub fn run(cli: &Cli) -> Result<Report> {
    cli.command.run(&cli.global)
}

/// Runs the command line of this process; see `nf4 --help`.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = output::clean_up_when_interrupted().and_then(|()| run(&cli));
    match result {
        Ok(Report { text, json, good }) => {
            report::print(&if cli.global.json { format!("{json:#}\n") } else { text });
            if good { ExitCode::SUCCESS } else { ExitCode::from(3) }
        }
        Err(error) => {
            if cli.global.json {
                report::print(&format!("{:#}\n", json!({ "error": format!("{error:#}") })));
            }
            eprintln!("nf4: {error:#}");
            ExitCode::FAILURE
        }
    }
}
