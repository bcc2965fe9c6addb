# The steps for WebAssembly. The standard library is built from its source, with a C library for WASI from a package.

use_wasm() {
    use_debian_rust
    export CARGO_TARGET_DIR=$PWD/target/wasm
    command -v node >/dev/null || needs nodejs
    echo "node $(node --version), $(wasm-ld --version)"
}

# wasm_test FLAGS ARGUMENTS...: the tests of tests/wasm, or of another $manifest, in Node.
wasm_test() {
    local libc=/usr/lib/wasm32-wasi
    local link="-C linker=wasm-ld -C linker-flavor=wasm-ld -C link-self-contained=no"
    # The standard library names functions for threads that this C library does not have; run.mjs brings them.
    link+=" -C link-arg=--allow-undefined -C link-arg=$libc/crt1-command.o -L native=$libc"
    RUSTFLAGS="-D warnings $link $1" NF4_REFERENCE=$PWD/tests/data/reference \
        CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings $PWD/tests/wasm/run.mjs" \
        cargo test --locked -Zbuild-std=std,panic_abort --target wasm32-wasip1 \
        --manifest-path "${manifest:-tests/wasm/Cargo.toml}" \
        "${@:2}" -- --nocapture # a panic ends the program at once, with what was captured
}

check_wasm() {
    local clippy
    needs wasi-libc
    use_wasm
    cargo fmt --check --manifest-path tests/wasm/Cargo.toml
    RUSTFLAGS="-C target-feature=+simd128" "$clippy" clippy -q --locked -Zbuild-std=core,alloc \
        --target wasm32-unknown-unknown -p nf4-kernels -p nf4 -- -D warnings
    NF4_REQUIRE_ISA=simd128 wasm_test "-C target-feature=+simd128"
    # Portable code, all of which runs on this machine too.
    NF4_REQUIRE_ISA=scalar NF4_EVERY=3 wasm_test "" --test exactness --test vectors
}

check_web() {
    local clippy
    needs chromium
    use_wasm
    chromium --version
    cargo fmt --check --manifest-path examples/web/Cargo.toml
    # For this machine, which has a standard library; nothing depends on the target but the kernels.
    "$clippy" clippy -q --locked --release --manifest-path examples/web/Cargo.toml -- -D warnings
    WASM_LD=wasm-ld bash examples/web/build.sh
    node examples/web/test.mjs
}
