# What the steps need beyond a rustup toolchain: Debian packages, and Debian's compiler among them.

# needs PACKAGE...: installs those that are not there. One step at a time, and the lists are fetched once.
needs() {
    local there
    there=$(dpkg-query -W -f '${db:Status-Status}\n' "$@" 2>/dev/null | grep -cx installed || true)
    if ((there < $#)); then
        export DEBIAN_FRONTEND=noninteractive
        (
            flock 9
            if [[ ! -e $notes/lists ]]; then
                dpkg --add-architecture arm64 # for the standard library of aarch64
                apt-get update -qq -o Acquire::Retries=3
                touch "$notes/lists"
            fi
            apt-get install -qq -y --no-install-recommends -o Acquire::Retries=3 "$@" >/dev/null
        ) 9>"$notes/lock"
    fi
}

# from_package PACKAGE PROGRAM: where Debian put it; the rustup program of the same name comes first in PATH.
from_package() {
    dpkg -L "$1" | grep "/bin/$2\$"
}

declared_rust_version() {
    sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml
}

# Debian's compiler, for targets other than the machine's own: the rustup toolchain has only that one's standard library.
# It comes with the source of the standard library, and is exported as RUSTC; its clippy is $clippy. Each target has its own
# folder under target/: no step reuses another compiler's work.
use_debian_rust() {
    needs rustc-web rust-web-clippy rust-web-src lld
    RUSTC=$(from_package rustc-web rustc)
    clippy=$(from_package rust-web-clippy cargo-clippy)
    export RUSTC
    export RUSTC_BOOTSTRAP=1 # for -Zbuild-std
    "$RUSTC" --version
    dpkg --compare-versions "$(dpkg-query -W -f '${Version}' rustc-web)" ge "$(declared_rust_version)" ||
        { echo "too old: the suite bookworm-security has a newer one"; return 1; }
}

# The tests fail where the instruction set of this machine is missing from what they ran.
require_isa() {
    if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then export NF4_REQUIRE_ISA=avx2; fi
    case $(uname -m) in arm64 | aarch64) export NF4_REQUIRE_ISA=neon ;; esac
    echo "required instruction set: ${NF4_REQUIRE_ISA:-none}"
}
