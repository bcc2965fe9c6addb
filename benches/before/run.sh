#!/usr/bin/env bash
# benches/before/run.sh [ISA [TEXT]]: the kernels of this tree beside those of commit $BEFORE in one process.
#
# The crate is made outside this repository, because cargo would take the older kernels for a member of its workspace.
set -euo pipefail
cd "$(dirname "$0")/../.."
before=${BEFORE:-322f349}
crate=${TMPDIR:-/tmp}/nf4-before
mkdir -p "$crate"
rm -rf "$crate/$before"
mkdir "$crate/$before"
git archive "$before" | tar -x -C "$crate/$before"
# Two packages of a name need two versions.
sed -i 's/^version = .*/version = "0.0.0"/' "$crate/$before/Cargo.toml"
cat >"$crate/Cargo.toml" <<END
[package]
name = "before"
version = "0.0.0"
edition = "2024"

[workspace]
exclude = ["$before"]

[[bin]]
name = "before"
path = "$PWD/benches/before/main.rs"

[dependencies]
before = { package = "nf4-kernels", path = "$before/kernels" }
after = { package = "nf4-kernels", path = "$PWD/kernels" }
END
cp Cargo.lock "$crate"
cargo build -q --release --manifest-path "$crate/Cargo.toml" --target-dir "$crate/target"
exec "$crate/target/release/before" "$@"
