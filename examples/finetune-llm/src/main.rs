//! Fine-tunes a language model; see `--help`.

use clap::Parser;

fn main() -> anyhow::Result<()> {
    nf4_finetune_llm::run(&nf4_finetune_llm::Arguments::parse())
}
