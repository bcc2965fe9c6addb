#!/usr/bin/env bash
# Builds the page into dist/, with WebAssembly modules for what browsers can do, because a browser compiles a module only if it
# knows every instruction in it:
#
#     nf4-threads.wasm   SIMD and shared memory, for pages that are isolated (serve.mjs)
#     nf4-simd128.wasm   SIMD
#     nf4-scalar.wasm    neither
#
#     bash build.sh              # all three
#     bash build.sh simd128      # only this one
#
# A stable toolchain with the target's standard library (`rustup target add wasm32-unknown-unknown`) makes the last two. Threads
# need a standard library that is compiled for them, from its source: RUSTC names a compiler that has it (for rustup's nightly,
# `rustup component add rust-src`), and RUSTC_BOOTSTRAP=1 is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build_std=()
modules=(simd128 scalar)
if [[ ${RUSTC_BOOTSTRAP:-} == 1 ]]; then
    build_std=(-Zbuild-std=std,panic_abort)
    modules=(threads "${modules[@]}")
fi
if (($#)); then modules=("$@"); fi

# The linker's options for threads: each is an instance of the module on the memory that threads.mjs makes, 16 MiB at first.
shared="-C target-feature=+simd128,+atomics"
for option in --shared-memory --import-memory --initial-memory=$((1 << 24)) --max-memory=$((1 << 32)) \
    --export=__stack_pointer --export=__wasm_init_tls --export=__tls_size; do
    shared+=" -C link-arg=$option"
done

rm -rf dist
mkdir dist
cp index.html ./*.mjs dist/
rm dist/{test,browser,serve}.mjs
for module in "${modules[@]}"; do
    # src/random.rs has what the tokenizer's hash maps want of the system.
    flags='--cfg getrandom_backend="custom"'
    if [[ ${WASM_LD:-} ]]; then flags+=" -C linker=$WASM_LD -C linker-flavor=wasm-ld"; fi
    case $module in
        threads) flags+=" $shared" ;;
        simd128) flags+=" -C target-feature=+simd128" ;;
        scalar) ;;
        *) echo "no module is called $module" >&2; exit 2 ;;
    esac
    RUSTFLAGS=$flags \
        cargo build -q --release --locked ${build_std[@]+"${build_std[@]}"} --target wasm32-unknown-unknown
    cp "${CARGO_TARGET_DIR:-target}/wasm32-unknown-unknown/release/nf4_web.wasm" "dist/nf4-$module.wasm"
done
ls -l dist
