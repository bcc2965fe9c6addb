//! The program: a chat, single prompts, batches with an adapter per sequence, and a benchmark.

mod awake;
mod batch;
mod bench;
mod chat;
mod loaded;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::path::PathBuf;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use nf4::Arithmetic;

use crate::cache::CacheType;
use crate::sample::Sampling;

pub use awake::{Awake, awake};

/// A language model on NF4 weights: a chat, or the continuation of a prompt.
///
/// The model is a Hugging Face directory of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2), quantized by
/// transformers and bitsandbytes or by `nf4 quantize`; it is mapped, not copied. Another one is quantized while it is
/// loaded. The logits are the same bits on every machine and for any number of threads.
#[derive(Debug, Parser)]
#[allow(clippy::doc_markdown, reason = "these texts are shown as they are")]
#[command(
    name = "llama",
    after_help = "\
Examples:
  llama SmolLM2-nf4
  llama SmolLM2-nf4 --prompt 'Why is the sky blue?' --temperature 0.7 --seed 1
  llama SmolLM2-nf4 --adapter pirate=adapters/pirate   then /adapter pirate, /adapter none
  llama SmolLM2-nf4 --adapter a=A --adapter b=B --batch prompts.txt
  llama SmolLM2-nf4 --bench"
)]
pub struct Arguments {
    /// The directory of the model
    model: PathBuf,
    /// An adapter of PEFT, and a name for it; may be given several times
    #[arg(long = "adapter", value_name = "NAME=DIR", value_parser = named)]
    adapters: Vec<(String, PathBuf)>,
    /// How packed weights are multiplied
    #[arg(long, default_value = "16x4")]
    arithmetic: ArithmeticName,
    /// Whether the output head keeps its type or is quantized too
    #[arg(long, default_value = "keep")]
    head: Head,
    /// The type of the cache of keys and values
    #[arg(long, default_value = "f32")]
    cache: CacheName,
    /// Positions of the cache [default: those of the model, at most 4096]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Threads [default: as many as the machine has]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tokens of a prompt that are computed at a time
    #[arg(long, default_value = "128", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Answer this and end; without it there is a chat
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Continue the prompt as it stands, without the chat template
    #[arg(long, requires = "prompt")]
    raw: bool,
    /// What the assistant is told to be
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The adapter to begin with
    #[arg(long = "use", value_name = "NAME")]
    first_adapter: Option<String>,
    /// Answer the prompts of a file together, one a line, each with its own adapter: `NAME: text` or `none: text`
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    batch: Option<PathBuf>,
    /// Time a prompt of 512 tokens and decoding
    #[arg(long, conflicts_with_all = ["prompt", "batch"])]
    bench: bool,
    /// How often it is timed
    #[arg(long, default_value = "5", value_name = "N", requires = "bench")]
    repeats: usize,
    /// The most tokens of an answer
    #[arg(long, default_value = "512", value_name = "N")]
    max_tokens: usize,
    /// What logits are divided by; 0 takes the likeliest token
    #[arg(long, default_value = "0", value_name = "T")]
    temperature: f32,
    /// Choose among the K likeliest tokens; 0 takes all
    #[arg(long, default_value = "0", value_name = "K")]
    top_k: usize,
    /// Choose among the likeliest tokens that together have the probability P
    #[arg(long, default_value = "1", value_name = "P")]
    top_p: f32,
    /// The start of the random numbers
    #[arg(long, default_value = "0", value_name = "N")]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ArithmeticName {
    #[value(name = "16x4")]
    SixteenByFour,
    #[value(name = "8x8")]
    EightByEight,
    #[value(name = "f32")]
    F32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Head {
    Keep,
    Nf4,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CacheName {
    F32,
    F16,
}

impl Arguments {
    fn arithmetic(&self) -> Arithmetic {
        match self.arithmetic {
            ArithmeticName::SixteenByFour => Arithmetic::SixteenByFour,
            ArithmeticName::EightByEight => Arithmetic::EightByEight,
            ArithmeticName::F32 => Arithmetic::F32,
        }
    }

    fn cache_type(&self) -> CacheType {
        match self.cache {
            CacheName::F32 => CacheType::F32,
            CacheName::F16 => CacheType::F16,
        }
    }

    fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed }
    }
}

/// Runs the program with the arguments of the process.
///
/// # Errors
/// Whatever went wrong, with the file, tensor or field.
pub fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => available_parallelism().map_or(1, usize::from),
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build().context("threads")?;
    pool.install(|| {
        let mut loaded = loaded::Loaded::new(&arguments)?;
        if arguments.bench {
            bench::run(&mut loaded, threads, arguments.repeats)
        } else if let Some(file) = &arguments.batch {
            batch::run(&mut loaded, &arguments, file)
        } else if let Some(prompt) = &arguments.prompt {
            chat::answer(&mut loaded, &arguments, prompt)
        } else {
            chat::run(&mut loaded, &arguments)
        }
    })
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && name != "none" => Ok((name.to_string(), path.into())),
        _ => Err(format!("{text:?} is not NAME=DIR, with another name than none")),
    }
}
