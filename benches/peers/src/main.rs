#![doc = include_str!("../README.md")]

mod foreign;
mod measure;
mod ours;
mod run;
mod table;
mod workers;

#[cfg(feature = "candle")]
mod candle;
#[cfg(feature = "gemm")]
mod dense;
#[cfg(feature = "entrenar")]
mod entrenar;
#[cfg(feature = "llama")]
mod llama;

use std::{env, fs};

use anyhow::{Context, Result, bail};

use measure::{Entry, Problem};

/// Makes the entries of a library, if it was built.
type Make = Option<fn(&Problem) -> Vec<Result<Entry>>>;

const PEERS: [(&str, Make); 6] = [
    ("a pure read", Some(ours::read)),
    ("nf4", Some(ours::entries)),
    #[cfg(feature = "candle")]
    ("candle", Some(candle::entries)),
    #[cfg(not(feature = "candle"))]
    ("candle", None),
    #[cfg(feature = "llama")]
    ("llama.cpp", Some(llama::entries)),
    #[cfg(not(feature = "llama"))]
    ("llama.cpp", None),
    #[cfg(feature = "gemm")]
    ("gemm", Some(dense::entries)),
    #[cfg(not(feature = "gemm"))]
    ("gemm", None),
    #[cfg(feature = "entrenar")]
    ("entrenar", Some(entrenar::entries)),
    #[cfg(not(feature = "entrenar"))]
    ("entrenar", None),
];

#[derive(Debug, Clone, Default)]
struct Options {
    quick: bool,
    json: Option<String>,
    table: Option<String>,
    python: Option<String>,
    core: Option<String>,
    only: String,
    threads: Option<usize>,
    /// Measure here, for the process that collects.
    worker: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let (mut options, mut args) = (Self::default(), env::args().skip(1));
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--worker" => options.worker = true,
                "--json" => options.json = Some(value()?),
                "--table" => options.table = Some(value()?),
                "--python" => options.python = Some(value()?),
                "--core" => options.core = Some(value()?),
                "--only" => options.only = value()?,
                "--threads" => options.threads = Some(value()?.parse()?),
                _ => bail!("unknown argument {arg}; README.md has them all"),
            }
        }
        Ok(options)
    }

    /// Rows, columns, rounds.
    fn shape(&self) -> [usize; 3] {
        if self.quick { [1024, 1024, 3] } else { [4096, 4096, 15] }
    }
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    if options.worker {
        return workers::work(&options);
    }
    if let Some(path) = &options.table {
        let text = fs::read_to_string(path).with_context(|| path.clone())?;
        table::print(&serde_json::from_str(&text)?);
        return Ok(());
    }
    let run = workers::collect(&options)?;
    table::print(&run);
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&run)? + "\n").with_context(|| path.clone())?;
    }
    Ok(())
}
