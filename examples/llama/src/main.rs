//! A language model on NF4 weights, on the terminal.

fn main() -> anyhow::Result<()> {
    nf4_llama::program::run()
}
