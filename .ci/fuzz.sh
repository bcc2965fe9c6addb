# The fuzz targets, for a short time each; fuzz/README.md says what they promise and how to run them for longer.

cargo_fuzz=0.13.2

# fuzz_run NAME COMMAND...: the last state that libFuzzer reports, or all of what it says if it found something.
fuzz_run() {
    local log
    log=$(mktemp)
    if "${@:2}" >"$log" 2>&1; then
        printf '%-12s %s\n' "$1" "$(grep -E '(INITED|DONE) ' "$log" | tail -n 1)"
    else
        grep -vE '(NEW|REDUCE|pulse|RELOAD) ' "$log"
        return 1
    fi
}

# fuzz_target NAME SECONDS: what was found before, the seeds, and then what is new.
fuzz_target() {
    local start known=("corpus/$1") options=(-timeout=120 -rss_limit_mb=3000 -malloc_limit_mb=512)
    if [[ -d regressions/$1 ]]; then known+=("regressions/$1"); fi
    mkdir -p "artifacts/$1"
    options+=("-artifact_prefix=$PWD/artifacts/$1/") # a target may fail in another folder
    set -e
    fuzz_run "$1" "target/x86_64-unknown-linux-gnu/release/$1" "${options[@]}" -runs=0 "${known[@]}"
    # Of inputs with very many names each takes seconds: they are run once, and nothing is made from them.
    start=$(mktemp -d)
    find "corpus/$1" -type f ! -name '*many*' -exec cp -t "$start" {} +
    fuzz_run "$1" "target/x86_64-unknown-linux-gnu/release/$1" "${options[@]}" "-max_total_time=$2" "$start"
    rm -r "$start"
}

check_fuzz() {
    if [[ $(cargo fuzz --version 2>/dev/null) != "cargo-fuzz $cargo_fuzz" ]]; then
        # It runs for a second; not to optimize it halves the time to compile it.
        cargo install -q --locked --debug cargo-fuzz --version "$cargo_fuzz"
    fi
    cargo fmt --check --manifest-path fuzz/Cargo.toml
    # In the folder of the other steps, where most of what it depends on has been checked already.
    CARGO_TARGET_DIR=target cargo clippy -q --locked --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings
    export RUSTC_BOOTSTRAP=1 # a stable compiler has the sanitizers, but asks for this
    cd fuzz
    cargo fuzz build
    target/x86_64-unknown-linux-gnu/release/seeds
    # As many at a time as there are cores, each for longer with more of them: 12 seconds with two.
    export -f fuzz_run fuzz_target
    cargo fuzz list | grep -vx seeds | xargs -P "$(nproc)" -I NAME bash -c "fuzz_target NAME $((6 * $(nproc)))"
}
