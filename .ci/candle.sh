# The steps for what is built on candle: the crate nf4-candle and examples/finetune-llm, one workspace.

check_candle() {
    require_isa
    cargo fmt --all --check --manifest-path candle/Cargo.toml
    # Not `--release`: the profile of tests does not optimize candle, which halves the time of this step.
    cargo clippy -q --locked --manifest-path candle/Cargo.toml --workspace --all-targets -- -D warnings
    cargo test --locked --manifest-path candle/Cargo.toml --workspace -- --nocapture
}
