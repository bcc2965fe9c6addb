//! The tool `nf4`: looks into, quantizes, restores, merges and checks model files; measures this machine.
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

use crate::report::Report;

/// 4-bit NormalFloat (NF4) weights and QLoRA adapters in safetensors files.
///
/// Works on single files and on whole model directories: `config.json`, and `model.safetensors` or shards with
/// `model.safetensors.index.json`. Tensors are streamed: a model need not fit in memory.
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXIT_CODES, disable_help_subcommand = true)]
struct Cli {
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

/// Runs the command line of this process; see `nf4 --help`.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = output::clean_up_when_interrupted().and_then(|()| cli.command.run(&cli.global));
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
