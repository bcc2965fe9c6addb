# The steps for targets other than the machine's own. The rustup toolchain has only that one's standard library, so they
# use Debian's compiler, `rustc-web`. Each target has its own folder under target/: no step reuses another's work.

packages=(
    rustc-web rust-web-clippy rust-web-src
    libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    gcc-powerpc64-linux-gnu libc6-dev-ppc64-cross
    python3
)

# from_package PACKAGE PROGRAM: where Debian put it; the rustup program of the same name comes first in PATH.
from_package() {
    dpkg -L "$1" | grep "/bin/$2\$"
}

# Debian's compiler is there and at least the declared rust-version.
compiler_is_recent() {
    local minimum version
    minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    version=$(dpkg-query -W -f '${Version}' rustc-web) && dpkg --compare-versions "$version" ge "$minimum"
}

check_install() {
    if ! { dpkg-query -W "${packages[@]}" && compiler_is_recent; } &>/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        dpkg --add-architecture arm64
        apt-get update -qq -o Acquire::Retries=3
        apt-get install -qq -y --no-install-recommends -o Acquire::Retries=3 "${packages[@]}" >/dev/null
    fi
    "$(from_package rustc-web rustc)" --version
    compiler_is_recent || { echo "too old: the suite bookworm-security has a newer one"; return 1; }
    qemu-aarch64 --version | head -n 1
}

use_aarch64() {
    target=aarch64-unknown-linux-gnu
    RUSTC=$(from_package rustc-web rustc)
    export RUSTC
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # `-L /`: with the cross compiler's own libraries a program that starts a thread hangs.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /"
    export CARGO_TARGET_DIR=target/aarch64
}

check_neon_lint() {
    local target clippy
    use_aarch64
    clippy=$(from_package rust-web-clippy cargo-clippy)
    "$clippy" clippy -q --locked --workspace --exclude nf4-cli --target "$target" --lib --tests -- -D warnings
}

check_neon_test() {
    local target
    use_aarch64
    NF4_REQUIRE_ISA=neon cargo test --locked --workspace --exclude nf4-cli --target "$target" --lib --tests
}

check_neon_count() {
    use_aarch64
    python3 .ci/neon_instructions.py --target-dir "$CARGO_TARGET_DIR"
}

# Portable code where the first byte of a number is its highest. Not on s390x: its emulator in Debian 12 (QEMU 7.2) takes
# the first factor of `mdeb`, which multiplies two f32 to f64, for an f64, so that the tests' own float64 is wrong.
check_big_endian() {
    local target=powerpc64-unknown-linux-gnu output
    RUSTC=$(from_package rustc-web rustc)
    export RUSTC
    export RUSTC_BOOTSTRAP=1 # for -Zbuild-std
    export CARGO_TARGET_POWERPC64_UNKNOWN_LINUX_GNU_LINKER=powerpc64-linux-gnu-gcc
    export CARGO_TARGET_POWERPC64_UNKNOWN_LINUX_GNU_RUNNER="qemu-ppc64 -L /usr/powerpc64-linux-gnu"
    export CARGO_TARGET_DIR=target/big_endian
    "$RUSTC" --print cfg --target "$target" | grep -x 'target_endian="big"'
    output=$(NF4_REQUIRE_ISA=scalar cargo test -q --locked -Zbuild-std=std --target "$target" --features safetensors \
        --test exactness --test vectors --test views --test reference --test checkpoint -- --nocapture) ||
        { echo "$output"; return 1; }
    # Every test program, the table of the reference, and the hash of the test vector.
    grep -E '^test result|^vectors|cases|^reference' <<<"$output"
}

check_bare() {
    local target
    RUSTC=$(from_package rustc-web rustc)
    export RUSTC
    export RUSTC_BOOTSTRAP=1 # for -Zbuild-std
    export RUSTFLAGS="-D warnings"
    export CARGO_TARGET_DIR=target/bare

    for target in thumbv7em-none-eabihf thumbv6m-none-eabi riscv32imac-unknown-none-elf aarch64-unknown-none; do
        cargo build -q --locked -Zbuild-std=core -p nf4-kernels --target "$target"
        cargo build -q --locked -Zbuild-std=core -p nf4 --no-default-features --target "$target"
        cargo build -q --locked -Zbuild-std=core,alloc -p nf4 --target "$target"
        echo "$target: nf4-kernels, nf4 without alloc, nf4"
    done
    # Its dependencies need atomic compare-and-swap, which thumbv6m does not have.
    target=thumbv7em-none-eabihf
    cargo build -q --locked -Zbuild-std=core,alloc -p nf4 --features safetensors --target "$target"
    echo "$target: nf4 with checkpoints"
}
