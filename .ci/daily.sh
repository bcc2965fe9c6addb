# The steps that a stable rustup toolchain can do, on any system.

# The line of README.md is the command that is run, so that neither can change alone.
readme_command() {
    grep -qF -- "$*" README.md || { echo "README.md does not name the command: $*"; return 1; }
    "$@"
}

check_lock() {
    local lock
    rustc --version
    # Also those of the crates outside of the workspace, which fall behind when one inside gets a dependency.
    for lock in $(lock_files); do
        (cd "$(dirname "$lock")" && cargo update -q --workspace --locked) || { echo "$lock does not fit"; return 1; }
    done
}

lock_files() {
    find . -name target -prune -o -name Cargo.lock -print | sort
}

# Unsafe code is a denied lint of the workspace, which modules of the kernels expect with a reason: `cargo clippy` checks
# that. What is left are the crates outside of the workspace. The name of an exported function can do no harm; benches/peers
# calls the C interface of llama.cpp to time it, examples/llama maps a file and has the lint itself, and examples/web fills a
# buffer of `getrandom`.
check_unsafe() {
    local file found
    for file in src/lib.rs cli/src/lib.rs cli/src/main.rs; do
        grep -q '^#!\[forbid(unsafe_code)\]' "$file" || { echo "$file does not forbid unsafe code"; return 1; }
    done
    for file in Cargo.toml examples/llama/Cargo.toml candle/Cargo.toml; do
        grep -qE '^unsafe_code = "(deny|forbid)"' "$file" || { echo "unsafe code is not denied in $file"; return 1; }
    done
    found=$(grep -rnw --include='*.rs' --exclude-dir=target unsafe fuzz examples/cortex-m examples/web tests/wasm |
        grep -vE -e '^[^:]*:[0-9]+: *//' -e ':#\[unsafe\(no_mangle\)\]$' -e '^examples/web/src/random\.rs:' || true)
    [[ -z $found ]] || { printf 'unsafe code:\n%s\n' "$found"; return 1; }
    found=$(grep -rlE --include='*.rs' '(expect|allow)\(unsafe_code' src kernels cli tests benches examples fuzz |
        grep -v -e '^kernels/src/isa/' -e '^kernels/src/kernels\.rs$' -e '^examples/llama/src/map\.rs$' || true)
    [[ -z $found ]] || { printf 'unsafe code is expected where it is not meant to be:\n%s\n' "$found"; return 1; }
}

check_format() {
    cargo fmt --all --check
}

check_lint() {
    cargo clippy -q --locked --workspace --all-targets -- -D warnings
    cargo clippy -q --locked --workspace --all-targets --all-features -- -D warnings
    cargo clippy -q --locked --workspace --lib --no-default-features -- -D warnings
}

# The project's own code is checked by clippy's `incompatible_msrv`, in the step `lint`, which knows since when each function
# of the standard library is stable. This step adds the dependencies, and compiles with that version if rustup has it.
check_msrv() {
    local version newest
    version=$(declared_rust_version)
    grep -q '^incompatible_msrv = "warn"' Cargo.toml
    newest=$(cargo metadata --locked --format-version 1 --all-features |
        grep -o '"rust_version":"[0-9.]*"' | tr -d -c '0-9.\n' |
        sort -t . -k 1,1n -k 2,2n | tail -n 1)
    echo "declared: $version; the newest that any package of the tree declares: $newest"
    awk -v have="$version" -v need="$newest" 'BEGIN { split(have, h, "."); split(need, n, "."); exit h[2] + 0 < n[2] + 0 }'
    if rustup toolchain list 2>/dev/null | grep -q "^$version[.-]"; then
        CARGO_TARGET_DIR=target/msrv cargo "+$version" check -q --locked -p nf4 -p nf4-cli --all-features
        echo "compiled with $version"
    else
        echo "not compiled with $version, which is not installed; the GitHub workflow does"
    fi
}

check_docs() {
    RUSTDOCFLAGS="-D warnings" cargo doc -q --locked --workspace --no-deps --all-features
}

check_test() {
    require_isa
    readme_command cargo test --workspace
}

check_features() {
    cargo test --locked -p nf4 --no-default-features --lib --test exactness --test vectors --test views
    cargo build -q --locked -p nf4-kernels
    cargo test --locked -p nf4 --all-features --lib --test allocation --test threads --test checkpoint
}

check_release() {
    require_isa
    cargo test --release --locked -p nf4 --test exactness
    # With the number of cases on each instruction set.
    cargo test --release --locked -p nf4 --test reference -- --nocapture
}

check_example() {
    readme_command cargo run --release --example qlora
    cargo run --release --locked --example finetune
}

check_package() {
    local dirty=()
    [[ ${CI:-} == true ]] || dirty=(--allow-dirty)
    # Cargo takes a version of a package for something that never changes: what it unpacked and compiled of nf4-kernels in an
    # earlier run, it would take again.
    rm -rf target/packages "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/nf4{,-kernels,-cli}-[0-9]*
    cargo package -q --locked --target-dir target/packages -p nf4-kernels -p nf4 -p nf4-cli ${dirty[@]+"${dirty[@]}"}
    ls -l target/packages/package/*.crate
}
