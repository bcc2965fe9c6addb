# The steps for other processors and systems.

use_aarch64() {
    target=aarch64-unknown-linux-gnu
    needs libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    use_debian_rust
    unset RUSTC_BOOTSTRAP # the standard library is there
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # `-L /`: with the cross compiler's own libraries a program that starts a thread hangs.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /"
    export CARGO_TARGET_DIR=target/aarch64
}

check_neon_lint() {
    local target clippy
    use_aarch64
    "$clippy" clippy -q --locked --workspace --exclude nf4-cli --target "$target" --lib --tests -- -D warnings
}

check_neon_test() {
    local target clippy
    use_aarch64
    local run=(cargo test --locked -p nf4 --target "$target")
    local runner=CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER cpu
    # A Cortex-A57 has neither `dotprod` nor `i8mm`, a Cortex-A76 only the first, `max` both. All but 8x8 is the same.
    export $runner="qemu-aarch64 -L / -cpu cortex-a57"
    # Every third exact test has every shape and every block size, but not with each other.
    NF4_REQUIRE_ISA=neon,scalar NF4_EVERY=3 "${run[@]}" -p nf4-kernels --lib --tests
    for cpu in cortex-a57 cortex-a76 max; do
        export $runner="qemu-aarch64 -L / -cpu $cpu"
        "${run[@]}" -q --test vectors -- --nocapture | grep ^vectors >"$CARGO_TARGET_DIR/vectors-$cpu"
        sed "s/^/$cpu: /" "$CARGO_TARGET_DIR/vectors-$cpu"
    done
    (($(wc -l <"$CARGO_TARGET_DIR/vectors-cortex-a57") == 2)) # `neon` and `scalar`
    (($(wc -l <"$CARGO_TARGET_DIR/vectors-cortex-a76") == 3))
    NF4_REQUIRE_ISA=neon-i8mm,neon-dotprod,neon NF4_EVERY=7 "${run[@]}" --test exactness -- eight required
}

check_neon_count() {
    local target clippy
    needs python3
    use_aarch64
    python3 .ci/neon_instructions.py --target-dir "$CARGO_TARGET_DIR"
}

# Portable code where the first byte of a number is its highest. Not on s390x: its emulator in Debian 12 (QEMU 7.2) takes
# the first factor of `mdeb`, which multiplies two f32 to f64, for an f64, so that the tests' own float64 is wrong.
check_big_endian() {
    local target=powerpc64-unknown-linux-gnu output clippy
    needs gcc-powerpc64-linux-gnu libc6-dev-ppc64-cross qemu-user
    use_debian_rust
    export CARGO_TARGET_POWERPC64_UNKNOWN_LINUX_GNU_LINKER=powerpc64-linux-gnu-gcc
    export CARGO_TARGET_POWERPC64_UNKNOWN_LINUX_GNU_RUNNER="qemu-ppc64 -L /usr/powerpc64-linux-gnu"
    export CARGO_TARGET_DIR=target/big_endian
    "$RUSTC" --print cfg --target "$target" | grep -x 'target_endian="big"'
    output=$(NF4_REQUIRE_ISA=scalar cargo test -q --locked -Zbuild-std=std --target "$target" --features safetensors \
        --test exactness --test vectors --test views --test reference --test checkpoint -- --nocapture --skip time::) ||
        { echo "$output"; return 1; }
    # Every test program, the table of the reference, and the hash of the test vector.
    grep -E '^test result|^vectors|cases|^reference' <<<"$output"
}

check_bare() {
    local target features disassembly
    use_debian_rust
    export RUSTFLAGS="-D warnings"
    export CARGO_TARGET_DIR=target/bare

    # That these two do without `alloc`, in portable code and in that of NEON; x86-64 follows.
    for target in thumbv7em-none-eabihf aarch64-unknown-none; do
        cargo build -q --locked -Zbuild-std=core -p nf4-kernels -p nf4 --no-default-features --target "$target"
        echo "$target: nf4-kernels and nf4 without alloc, where there is none"
    done
    for target in thumbv7em-none-eabihf thumbv6m-none-eabi riscv32imac-unknown-none-elf aarch64-unknown-none; do
        cargo build -q --locked -Zbuild-std=core,alloc -p nf4-kernels -p nf4 --no-default-features --target "$target"
        cargo build -q --locked -Zbuild-std=core,alloc -p nf4 --target "$target"
        echo "$target: nf4-kernels, nf4 without alloc, nf4"
    done
    # x86-64 without AVX2 kernels: pointers of 32 bits, and no registers for floats.
    for target in x86_64-unknown-linux-gnux32 x86_64-unknown-none; do
        cargo build -q --locked -Zbuild-std=core -p nf4-kernels --target "$target"
        echo "$target: nf4-kernels"
    done
    # An SGX enclave may not execute `cpuid`, with AVX2 compiled in or not. Only the kernels are compiled with it: they say
    # what is looked for, and core is built once.
    for features in "" "-C target-feature=+avx2" "-C target-feature=+avx2,+f16c"; do
        target=x86_64-fortanix-unknown-sgx
        # shellcheck disable=SC2086 # an option and its value, or none
        cargo rustc -q --locked -Zbuild-std=core -p nf4-kernels --target "$target" -- $features
        disassembly=$(objdump -d "$CARGO_TARGET_DIR/$target/debug/libnf4_kernels.rlib")
        grep -q '<nf4_kernels::\|nf4_kernels' <<<"$disassembly"
        if grep -w cpuid <<<"$disassembly"; then return 1; fi
        echo "$target $features: no cpuid"
    done
    # Its dependencies need atomic compare-and-swap, which thumbv6m does not have.
    target=thumbv7em-none-eabihf
    cargo build -q --locked -Zbuild-std=core,alloc -p nf4 --features safetensors --target "$target"
    echo "$target: nf4 with checkpoints"
}

# That the library and the tool compile where no test of this machine runs; nothing is linked.
check_systems() {
    local target clippy
    use_debian_rust
    export CARGO_TARGET_DIR=target/systems
    for target in aarch64-apple-darwin x86_64-pc-windows-msvc; do
        cargo check -q --locked -Zbuild-std=std,panic_abort --target "$target" -p nf4 -p nf4-cli --all-features
        echo "$target: nf4 with every feature, nf4-cli"
    done
}

check_circles() {
    needs python3
    python3 .ci/circles.py src kernels/src cli/src
}

# As docs.rs builds them, where features stand beside what needs them: `--cfg docsrs`, which a stable compiler takes with
# RUSTC_BOOTSTRAP. Then all links, also those of the repository's pages.
check_links() {
    local pages
    needs python3
    export RUSTC_BOOTSTRAP=1 RUSTDOCFLAGS="-D warnings --cfg docsrs"
    export CARGO_TARGET_DIR=target/docsrs
    cargo doc -q --locked --no-deps --all-features -p nf4-kernels -p nf4 -p nf4-cli
    mapfile -t pages < <(find . -name target -prune -o -name .venv -prune -o -name '*.md' -print)
    python3 .ci/links.py --docs target/docsrs/doc "${pages[@]}"
}
