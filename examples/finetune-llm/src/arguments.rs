//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::model::LINEARS;

/// Fine-tunes a language model on a text or on chats, with LoRA or DoRA on its NF4 weights, on a CPU.
///
/// The model is a Hugging Face directory of the Llama family, quantized by transformers and bitsandbytes or by `nf4 quantize`;
/// another one is quantized while it is loaded. The data is a text file, or a file `*.jsonl` with a chat on each line,
/// {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, of which the answers are
/// learned.
#[derive(Debug, Clone, Parser)]
#[allow(clippy::doc_markdown, reason = "these texts are shown as they are")]
#[command(
    name = "finetune-llm",
    args_override_self = true,
    allow_negative_numbers = true,
    after_help = "\
Examples:
  finetune-llm SmolLM2-nf4 chats.jsonl --out runs/a
  finetune-llm SmolLM2-nf4 chats.jsonl --out runs/a --resume         goes on after a stop
  finetune-llm SmolLM2-nf4 book.txt --out runs/b --context 256 --steps 500 --rank 16
  nf4 merge SmolLM2-nf4 --adapter runs/a/adapter-000200 --out merged
  llama SmolLM2-nf4 --adapter a=runs/a/adapter-000200 --use a"
)]
pub struct Arguments {
    /// The directory of the model
    pub model: PathBuf,
    /// A text file, or chats in a file *.jsonl
    pub data: PathBuf,
    /// Where the run is kept: checkpoint, adapters, losses
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with the run in the directory --out, with the same settings
    #[arg(long)]
    pub resume: bool,
    /// What the run is evaluated on, of the same kind; without it, a part of the data that is not trained on
    #[arg(long, value_name = "FILE")]
    pub evaluation: Option<PathBuf>,
    /// The part of the data that is kept for evaluation
    #[arg(long, value_name = "PART", default_value = "0.05", conflicts_with = "evaluation")]
    pub held_out: f64,
    /// The adapter of PEFT to start with, in place of a new one
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Linear layers that get an adapter
    #[arg(long, value_delimiter = ',', value_name = "NAMES", default_values = LINEARS, conflicts_with = "adapter")]
    pub targets: Vec<String>,
    /// The rank of the adapters
    #[arg(long, value_name = "R", default_value = "8", conflicts_with = "adapter", value_parser = clap::value_parser!(u16).range(1..))]
    pub rank: u16,
    /// The alpha of the adapters [default: twice the rank]
    #[arg(long, value_name = "A", conflicts_with = "adapter")]
    pub alpha: Option<f64>,
    /// Scale by alpha over the square root of the rank
    #[arg(long, conflicts_with = "adapter")]
    pub rslora: bool,
    /// Train the magnitudes of rows too: DoRA
    #[arg(long, conflicts_with = "adapter")]
    pub dora: bool,
    /// Passes over the data
    #[arg(long, value_name = "N", default_value = "1", conflicts_with = "steps")]
    pub epochs: f64,
    /// Steps, in place of passes
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Tokens of a sequence at most; short documents share one [default: 512, or what the model has positions for]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..))]
    pub accumulate: u16,
    /// The largest learning rate
    #[arg(long, value_name = "RATE", default_value = "2e-4")]
    pub learning_rate: f64,
    /// Steps until the largest learning rate [default: a twentieth of all]
    #[arg(long, value_name = "N")]
    pub warmup: Option<usize>,
    /// Weight decay of AdamW
    #[arg(long, value_name = "D", default_value = "0")]
    pub weight_decay: f64,
    /// The largest norm of the gradients
    #[arg(long, value_name = "NORM", default_value = "1")]
    pub clip: f64,
    /// Steps between evaluations, each of which saves an adapter and a checkpoint [default: a tenth of all]
    #[arg(long, value_name = "N")]
    pub evaluate_every: Option<usize>,
    /// Steps between checkpoints [default: with each evaluation alone]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub save_every: Option<u32>,
    /// How packed weights are multiplied in the forward
    #[arg(long, default_value = "16x4")]
    pub arithmetic: ArithmeticName,
    /// The start of the random numbers
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Keep the order of the data
    #[arg(long)]
    pub no_shuffle: bool,
    /// Stop this run after N steps, with a checkpoint, as if the machine were needed for something else
    #[arg(long, value_name = "N")]
    pub stop_after: Option<usize>,
    /// Write the sequences of all steps to a file, a JSON object per line, and end
    #[arg(long, value_name = "FILE")]
    pub write_batches: Option<PathBuf>,
}

/// The arithmetics of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArithmeticName {
    /// Activations of 14 bits.
    #[value(name = "16x4")]
    SixteenByFour,
    /// f32.
    #[value(name = "f32")]
    F32,
}
