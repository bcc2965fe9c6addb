#!/usr/bin/env bash
# Builds the page into dist/, with two WebAssembly modules:
#
#     nf4-threads.wasm   on memory that workers share, for a page that is isolated (serve.mjs)
#     nf4-simd128.wasm   one thread
#
#     bash build.sh              # both, or the last
#     bash build.sh threads      # only this one
#
# A toolchain with the target's standard library (`rustup target add wasm32-unknown-unknown`) makes the last. Threads need
# one that is compiled for them: RUSTC_BOOTSTRAP=1 makes it from its source (`rustup component add rust-src`, or the RUSTC
# that is named).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build_std=()
modules=(simd128)
if [[ ${RUSTC_BOOTSTRAP:-} == 1 ]]; then
    build_std=(-Zbuild-std=std,panic_abort)
    modules=(threads simd128)
fi
if (($#)); then modules=("$@"); fi

# Threads are instances of one module on the memory that threads.mjs makes, 16 MiB at first. Each gets a stack and thread-local
# variables through what is exported.
shared="-C target-feature=+simd128,+atomics,+bulk-memory,+mutable-globals"
for option in --shared-memory --import-memory --initial-memory=$((1 << 24)) --max-memory=$((1 << 32)) \
    --export={__wasm_init_tls,__tls_size,__tls_align,__tls_base,__stack_pointer}; do
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
        *) echo "no module is called $module" >&2; exit 2 ;;
    esac
    RUSTFLAGS=$flags \
        cargo build -q --release --locked ${build_std[@]+"${build_std[@]}"} --target wasm32-unknown-unknown
    cp "${CARGO_TARGET_DIR:-target}/wasm32-unknown-unknown/release/nf4_web.wasm" "dist/nf4-$module.wasm"
done
ls -l dist
