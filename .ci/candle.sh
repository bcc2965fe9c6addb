# The steps for what is built on candle: the crate nf4-candle and examples/finetune-llm, one workspace.

check_candle() {
    require_isa
    cargo fmt --all --check --manifest-path candle/Cargo.toml
    # One profile for all: candle is compiled once for the tests, and once more for the lints.
    cargo clippy -q --release --locked --manifest-path candle/Cargo.toml --workspace --all-targets -- -D warnings
    cargo test --release --locked --manifest-path candle/Cargo.toml --workspace -- --nocapture
}
