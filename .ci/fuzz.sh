# The fuzz targets, for a short time each; fuzz/README.md says what they promise and how to run them for longer.

cargo_fuzz=0.13.2
fuzz_seconds=30 # for each target

# fuzz_run COMMAND...: the last state that libFuzzer reports, or all of what it says if it found something.
fuzz_run() {
    local log
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        grep -E '(INITED|DONE) ' "$log" | tail -n 1
    else
        grep -vE '(NEW|REDUCE|pulse|RELOAD) ' "$log"
        return 1
    fi
}

check_fuzz() {
    local target binary options known
    if [[ $(cargo fuzz --version 2>/dev/null) != "cargo-fuzz $cargo_fuzz" ]]; then
        cargo install -q --locked cargo-fuzz --version "$cargo_fuzz"
    fi
    export RUSTC_BOOTSTRAP=1 # a stable compiler has the sanitizers, but asks for this
    cd fuzz
    cargo fmt --check
    cargo clippy -q --locked --all-targets -- -D warnings
    cargo run -q --locked --example seeds
    cargo fuzz build
    for target in $(cargo fuzz list); do
        binary=target/x86_64-unknown-linux-gnu/release/$target
        options=(-timeout=60 -rss_limit_mb=3000 -malloc_limit_mb=512 "-artifact_prefix=artifacts/$target/")
        mkdir -p "artifacts/$target"
        known=("corpus/$target")
        if [[ -d regressions/$target ]]; then known+=("regressions/$target"); fi
        echo "$target: ${known[*]}, and then $fuzz_seconds s"
        fuzz_run "$binary" "${options[@]}" -runs=0 "${known[@]}"
        fuzz_run "$binary" "${options[@]}" -max_total_time=$fuzz_seconds -max_len=8192 "corpus/$target"
    done
}
