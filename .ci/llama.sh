# The steps for examples/llama.

llama=examples/llama/Cargo.toml

check_llama() {
    require_isa
    cargo fmt --check --manifest-path $llama
    cargo clippy -q --locked --manifest-path $llama --all-targets -- -D warnings
    cargo clippy -q --locked --manifest-path $llama --no-default-features --lib -- -D warnings
    cargo test --locked --manifest-path $llama -- --nocapture
}

# The model without files and text, where the logits must have the hashes that are committed, and be near those of
# transformers. Emulators are slow: tests that compare a machine with itself run on this one alone.
check_llama_isa() {
    local target clippy isa features manifest tests=(--no-default-features --test model every_)
    (
        use_aarch64
        NF4_REQUIRE_ISA=neon cargo test --locked --manifest-path $llama --target "$target" "${tests[@]}" -- --nocapture
    )
    needs wasi-libc
    use_wasm
    for isa in simd128 scalar; do
        features=
        [[ $isa == scalar ]] || features="-C target-feature=+simd128"
        manifest=$llama
        NF4_REQUIRE_ISA=$isa wasm_test "$features" "${tests[@]}"
    done
}

# A real model: made, quantized, and compared with what transformers, bitsandbytes and PEFT make of it in f32 and in f64. A
# short text and few tokens: f64 is slow. The build is that of `llama`.
check_llama_model() {
    needs python3 python3-venv
    local models=examples/llama/models/SmolLM2-135M-Instruct reference
    bash examples/llama/get-model.sh
    reference=$(mktemp -d)
    TQDM_DISABLE=1 NF4_REQUIRE_UPSTREAM=1 bash tests/upstream/run.sh --script examples/llama/reference.py "$models" "$reference" \
        --text examples/llama/tests/data/smollm2/gpl3.txt --tokens 128 --steps 8 --cases nf4 lora dora
    cargo run -q --profile test --locked --manifest-path $llama --bin compare -- "$models-nf4" "$reference" \
        --adapter "lora=$reference/adapters/lora" --adapter "dora=$reference/adapters/dora"
    rm -r "$reference"
}
