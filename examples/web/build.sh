#!/usr/bin/env bash
# Builds the page into dist/, with a WebAssembly module for browsers with SIMD and one for those without: a browser compiles a
# module with SIMD only if it knows SIMD.
#
# A toolchain with the target's standard library (`rustup target add wasm32-unknown-unknown`) is enough. With another one, name
# it in RUSTC and set RUSTC_BOOTSTRAP=1: then the library is built from its source.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build_std=()
if [[ ${RUSTC_BOOTSTRAP:-} == 1 ]]; then
    build_std=(-Zbuild-std=std,panic_abort)
fi
# src/random.rs has what the tokenizer's hash maps want of the system.
flags='--cfg getrandom_backend="custom"'
flags+=" -C linker=${WASM_LD:-wasm-ld} -C linker-flavor=wasm-ld"

rm -rf dist
mkdir dist
for module in simd128 scalar; do
    case $module in
        simd128) features="-C target-feature=+simd128" ;;
        scalar) features="" ;;
    esac
    RUSTFLAGS="$flags $features" \
        cargo build -q --release --locked ${build_std[@]+"${build_std[@]}"} --target wasm32-unknown-unknown
    cp "${CARGO_TARGET_DIR:-target}/wasm32-unknown-unknown/release/nf4_web.wasm" "dist/nf4-$module.wasm"
done
cp index.html main.mjs worker.mjs engine.mjs files.mjs dist/
ls -l dist
