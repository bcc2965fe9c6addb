#!/usr/bin/env bash
# Makes the environment that check.py runs in:
#
#     bash tests/upstream/environment.sh VENV
#
# The wheel of torch is linked to CUDA libraries of more than 3 GB, which no CPU ever calls. Only the small one that is asked
# whether there is a GPU is installed; libraries of the names of the others are made here, each with the symbols that torch
# looks up when it is loaded, and with an instruction that stops the process if one is called after all. What remains is a
# download of about 650 MB. It needs x86-64 Linux, Python 3.11 or later, a C compiler and binutils.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1

"${NF4_UPSTREAM_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check --no-compile --no-deps -r "$here/requirements.txt"

cd "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib"
cuda=../../nvidia/cu13/lib
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

symbols() { nm -D "$@" 2>/dev/null | awk '{print $NF}' | sed 's/@.*//' | sort -u; }
comm -23 <(symbols --undefined-only lib*.so* | grep -E '^(cu[a-zA-Z]|nccl|nv)' | sort -u) \
    <(symbols --defined-only "$cuda"/lib*.so*) >"$work/wanted"
awk '{print ".globl " $1 "\n" $1 ":"} END {print "ud2"}' "$work/wanted" >"$work/stub.s"

for name in $(readelf -d lib*.so* | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort -u); do
    [[ $name =~ ^lib(cu|nccl|nv) && ! -e $name && ! -e $cuda/$name ]] || continue
    version=$name
    [[ $name != libnvshmem* ]] || version=NVSHMEM
    echo "$version { global: *; };" >"$work/map"
    cc -shared -nostdlib -Wl,-soname,"$name",--version-script="$work/map" -o "$name" "$work/stub.s"
done
