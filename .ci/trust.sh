# The steps that look for what tests alone do not see: memory errors, overflows, and what the dependencies bring.

# The tests that run kernels, layers and checkpoints. Not `allocation`, which forgets what it counts: leaks are errors
# here.
memory_tests=(--lib)
for test in algebra checkpoint concurrency exactness exhaustive guard_pages layer reference threads vectors views; do
    memory_tests+=(--test "$test")
done

# AddressSanitizer: reads and writes beyond any object, on heap and stack, uses after free, and leaks.
check_asan() {
    require_isa
    export RUSTC_BOOTSTRAP=1 # a stable compiler has the sanitizers, but asks for this
    export RUSTFLAGS="-Zsanitizer=address"
    # Tests ask for more memory than there is; what they expect is what an allocator does then.
    export ASAN_OPTIONS=allocator_may_return_null=1
    export CARGO_TARGET_DIR=target/asan
    # Every third exact test has every shape and every block size, on which memory errors depend.
    export NF4_EVERY=3
    # With a target, scripts and macros that run in the compiler are built without it.
    cargo test --locked -p nf4 -p nf4-kernels --features nf4/safetensors,nf4/rayon --target x86_64-unknown-linux-gnu \
        "${memory_tests[@]}"
}

# The code that is shipped, but with the checks of debug builds.
check_overflow() {
    require_isa
    export CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true
    export CARGO_TARGET_DIR=target/overflow
    cargo test --release --locked --workspace --all-features --lib --bins --tests
}

# Memcheck: what depends on bytes that were never written, which AddressSanitizer does not see.
check_valgrind() {
    needs valgrind libc6-dbg
    valgrind --version
    require_isa
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=9"
    cargo test --locked --workspace --test exactness --test guard_pages --test vectors --test views
}

# That packages are missing is a failure here.
check_upstream() {
    export NF4_REQUIRE_UPSTREAM=1
    bash tests/upstream/run.sh | tee >(cat >&2) | { ! grep -E 'NOT RUN|SKIPPED' >/dev/null; }
    bash tests/upstream/run.sh --script benches/training/training.py --check
}

# Licences that go with that of this project. One expression a line, as the packages write them.
licences='
(MIT OR Apache-2.0) AND NCSA
(MIT OR Apache-2.0) AND Unicode-3.0
Apache-2.0
Apache-2.0 / MIT
Apache-2.0 OR BSL-1.0
Apache-2.0 OR MIT
Apache-2.0 OR MIT OR Zlib
Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT
Apache-2.0/MIT
BSD-2-Clause OR Apache-2.0 OR MIT
BSD-2-Clause OR MIT OR Apache-2.0
CC0-1.0 OR MIT-0 OR Apache-2.0
MIT
MIT OR Apache-2.0
MIT OR Apache-2.0 OR LGPL-2.1-or-later
MIT/Apache-2.0
Unicode-3.0
Unlicense OR MIT
Unlicense/MIT
Zlib
Zlib OR Apache-2.0 OR MIT
'

# crates ARGUMENTS...: the crates of a tree, each once.
crates() {
    cargo tree --locked --prefix none --no-dedupe --format '{p}' "$@" | sed 's/ (.*//' | sort -u
}

# refused: of lines "LICENCE: PACKAGE", those whose licence is not in the list.
refused() {
    grep -vE "^($(grep . <<<"$licences" | sed 's/[().+]/\\&/g' | paste -sd '|' -)): " || true
}

# Where packages come from: the one source of Cargo.lock, which lock files of other folders must not differ from.
registry() {
    sed -n 's/^source = "\(registry+.*\)"$/\1/p' Cargo.lock | head -n 1
}

# unverified FILE: the packages of a lock file that come from elsewhere than the registry, or without a checksum.
unverified() {
    awk -v registry="\"$(registry)\"" '
        function check() {
            if (source != "" && (source != registry || !sum)) print name, source
            source = ""; sum = 0
        }
        /^\[\[package\]\]/ { check() }
        /^name = / { name = $3 }
        /^source = / { source = $3 }
        /^checksum = "[0-9a-f]+"$/ { sum = length($3) == 66 }
        END { check() }' "$1"
}

check_supply() {
    local target tree found lock folder planted
    for target in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu thumbv7em-none-eabihf wasm32-unknown-unknown; do
        tree=$(crates -p nf4 --no-default-features --edges normal,no-proc-macro --target "$target")
        echo "$target: $(wc -l <<<"$tree") crates in nf4 without features: ${tree//$'\n'/, }"
        (($(wc -l <<<"$tree") <= 7)) || { echo "more than seven"; return 1; }
    done
    tree=$(crates -p nf4 --edges normal,no-proc-macro)
    echo "$(wc -l <<<"$tree") with default features; $(crates -p nf4 --all-features | wc -l) with all, tests included"

    # What the two checks below must find.
    found=$(printf 'GPL-3.0-only: a\nMIT: b\nMIT OR Apache-2.0 AND GPL-2.0: c\n' | refused | wc -l)
    ((found == 2)) || { echo "licences are not checked"; return 1; }
    planted=$(mktemp)
    printf '[[package]]\nname = "%s"\nsource = "%s"\nchecksum = "%s"\n' \
        good "$(registry)" "$(printf '%064d' 0)" \
        git 'git+https://example.org/git#0123' "$(printf '%064d' 0)" \
        mirror 'registry+https://example.org/index' "$(printf '%064d' 0)" \
        short "$(registry)" 00 >"$planted"
    printf '[[package]]\nname = "none"\nsource = "%s"\n' "$(registry)" >>"$planted"
    found=$(unverified "$planted" | cut -d ' ' -f 1 | tr -d '"\n')
    [[ $found == gitmirrorshortnone ]] || { echo "lock files are not checked: only $found"; return 1; }
    rm "$planted"

    # Every feature, on every system, of what is built and what tests and build scripts need.
    for lock in $(lock_files); do
        folder=$(dirname "$lock")
        found=$(unverified "$lock")
        [[ -z $found ]] || { printf '%s: not from the registry, or without a checksum:\n%s\n' "$lock" "$found"; return 1; }
        case $folder in
            # Other people's engines, to be timed beside nf4; nothing that is shipped builds on them.
            ./benches/peers) echo "$lock: $(grep -c '^checksum' "$lock") packages of the registry" && continue ;;
        esac
        tree=$(cd "$folder" && cargo tree --locked --workspace --all-features --target all --edges normal,build,dev \
            --prefix none --no-dedupe --format '{l}: {p}' | grep -v '^: .*(/' | sort -u)
        found=$(refused <<<"$tree")
        [[ -z $found ]] || { printf '%s: licences that are not in the list:\n%s\n' "$lock" "$found"; return 1; }
        echo "$lock: $(grep -c '^checksum' "$lock") packages of the registry, under licences of the list"
    done
}
