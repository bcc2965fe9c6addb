# The steps that look for what tests alone do not see: memory errors, overflows, and what the dependencies bring.

# The tests that run kernels, layers and checkpoints. Not `allocation`, which forgets what it counts: leaks are errors
# here.
memory_tests=(--lib)
for test in algebra checkpoint concurrency exactness exhaustive guard_pages layer reference threads vectors views; do
    memory_tests+=(--test "$test")
done

require_avx2() {
    if grep -qw avx2 /proc/cpuinfo; then export NF4_REQUIRE_ISA=avx2; fi
    echo "required instruction set: ${NF4_REQUIRE_ISA:-none}"
}

# AddressSanitizer: reads and writes beyond any object, on heap and stack, uses after free, and leaks.
check_asan() {
    require_avx2
    export RUSTC_BOOTSTRAP=1 # a stable compiler has the sanitizers, but asks for this
    export RUSTFLAGS="-Zsanitizer=address"
    export CARGO_TARGET_DIR=target/asan
    # With a target, scripts and macros that run in the compiler are built without it.
    cargo test --locked -p nf4 -p nf4-kernels --features nf4/safetensors,nf4/rayon --target x86_64-unknown-linux-gnu "${memory_tests[@]}"
}

# The code that is shipped, but with the checks of debug builds.
check_overflow() {
    require_avx2
    export CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true
    export CARGO_TARGET_DIR=target/overflow
    cargo test --release --locked --workspace --all-features --lib --bins --tests
}

# Memcheck: what depends on bytes that were never written, which AddressSanitizer does not see.
check_valgrind() {
    if ! command -v valgrind >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq -o Acquire::Retries=3
        apt-get install -qq -y --no-install-recommends -o Acquire::Retries=3 valgrind libc6-dbg >/dev/null
    fi
    valgrind --version
    require_avx2
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=9"
    cargo test --locked --workspace --test exactness --test guard_pages --test vectors --test views
}

# Licences that go with that of this project. One expression a line, as the packages write them.
licences='
(MIT OR Apache-2.0) AND Unicode-3.0
Apache-2.0
Apache-2.0 OR MIT
Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT
BSD-2-Clause OR Apache-2.0 OR MIT
BSD-2-Clause OR MIT OR Apache-2.0
MIT
MIT OR Apache-2.0
MIT OR Apache-2.0 OR LGPL-2.1-or-later
MIT/Apache-2.0
Unlicense OR MIT
Unlicense/MIT
Zlib
Zlib OR Apache-2.0 OR MIT
'

# crates ARGUMENTS...: the crates of a tree, each once.
crates() {
    cargo tree --locked --prefix none --no-dedupe --format '{p}' "$@" | sed 's/ (.*//' | sort -u
}

check_supply() {
    local target tree unknown
    for target in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu thumbv7em-none-eabihf wasm32-unknown-unknown; do
        tree=$(crates -p nf4 --no-default-features --edges normal,no-proc-macro --target "$target")
        echo "$target: $(wc -l <<<"$tree") crates in nf4 without features: ${tree//$'\n'/, }"
        (($(wc -l <<<"$tree") <= 6)) || { echo "more than six"; return 1; }
    done
    tree=$(crates -p nf4 --edges normal,no-proc-macro)
    echo "$(wc -l <<<"$tree") with default features; $(crates -p nf4 --all-features | wc -l) with all, tests included"

    # Every feature, on every system, of what is built and what tests and build scripts need.
    tree=$(cargo tree --locked --workspace --all-features --target all --edges normal,build,dev --prefix none \
        --no-dedupe --format '{l}: {p}' | grep . | sort -u)
    unknown=$(grep -vE "^($(grep . <<<"$licences" | sed 's/[().+]/\\&/g' | paste -sd '|')): " <<<"$tree" || true)
    [[ -z $unknown ]] || { printf 'licences that are not in the list:\n%s\n' "$unknown"; return 1; }
    echo "$(wc -l <<<"$tree") packages under licences of the list"

    # Every package comes from the registry, with its checksum.
    unknown=$(grep -h '^source = ' Cargo.lock | grep -v '"registry+' || true)
    [[ -z $unknown ]] || { printf 'not from the registry:\n%s\n' "$unknown"; return 1; }
    [[ $(grep -c '^source = ' Cargo.lock) == $(grep -c '^checksum = ' Cargo.lock) ]] ||
        { echo "no checksum"; return 1; }
}
