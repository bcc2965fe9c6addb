#!/usr/bin/env bash
# Runs check.py, or with `--script FILE` another one, with $NF4_UPSTREAM_PYTHON or python3, if that has the packages of
# requirements.txt. If not:
#
#     NF4_UPSTREAM_VENV=DIR         makes an environment there (environment.sh; a minute, 1.9 GB), unless it is there
#     NF4_REQUIRE_UPSTREAM=1        fails; with it, and without a directory, the environment is made in target/upstream
#     neither                       says SKIPPED, and why
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${NF4_UPSTREAM_PYTHON:-python3}
script=tests/upstream/check.py
if [[ ${1:-} == --script ]]; then
    script=$2
    shift 2
fi
require=${NF4_REQUIRE_UPSTREAM:-}
venv=${NF4_UPSTREAM_VENV:-${require:+target/upstream}}

# Packages that are not there in the version that is wanted.
missing() {
    "$python" - tests/upstream/requirements.txt <<'PY' || echo "no $python"
import importlib.metadata as metadata, sys
wanted = [line.split("==") for line in open(sys.argv[1]).read().split("\n\n")[0].split() if "==" in line]
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
print(", ".join(f"{name} {version(name)} (wanted {v})" for name, v in wanted if version(name).split("+")[0] != v), end="")
PY
}

absent=$(missing)
if [[ -n $absent && -n $venv ]]; then
    if python=$venv/bin/python && [[ -n $(missing) ]]; then
        rm -rf "$venv"
        # Meanwhile, what check.py builds.
        cargo build -q --release --bin nf4 --example write_checkpoint &
        build=$!
        bash tests/upstream/environment.sh "$venv"
        wait "$build"
    fi
    absent=$(missing)
fi
if [[ -n $absent ]]; then
    echo "upstream check: SKIPPED: $absent"
    [[ -z $require ]] || { echo "but NF4_REQUIRE_UPSTREAM is set"; exit 1; }
    exit 0
fi
"$python" "$script" "$@"
