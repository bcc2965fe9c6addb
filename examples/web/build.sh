#!/usr/bin/env bash
# Builds the page into dist/: two WebAssembly modules, for a browser compiles a module with SIMD only if it knows SIMD.
#
# This is all with a toolchain that has the target's standard library (`rustup target add wasm32-unknown-unknown`). With
# another one, name it in RUSTC and set RUSTC_BOOTSTRAP=1: then the library is built from its source.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build_std=()
[[ ${RUSTC_BOOTSTRAP:-} != 1 ]] || build_std=(-Zbuild-std=std,panic_abort)
linker="-C linker=${WASM_LD:-wasm-ld} -C linker-flavor=wasm-ld"

mkdir -p dist
for isa in simd128 scalar; do
    features=
    [[ $isa == scalar ]] || features="-C target-feature=+simd128"
    RUSTFLAGS="$linker $features" \
        cargo build -q --release --locked "${build_std[@]}" --target wasm32-unknown-unknown
    cp "${CARGO_TARGET_DIR:-target}/wasm32-unknown-unknown/release/nf4_web.wasm" "dist/nf4-$isa.wasm"
done
cp index.html main.js layer.mjs dist/
cp ../../tests/data/reference/minilm/layer0_query.safetensors dist/layer.safetensors
ls -l dist
