#!/usr/bin/env bash
# Runs check.py if the packages of requirements.txt are there, with $NF4_UPSTREAM_PYTHON or python3; otherwise says
# that it did not. They take some 5 GB (torch depends on the CUDA libraries even where there is no GPU), so that they
# are not installed here:
#
#     python3 -m venv VENV && VENV/bin/pip install -r tests/upstream/requirements.txt
#     NF4_UPSTREAM_PYTHON=VENV/bin/python bash tests/upstream/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${NF4_UPSTREAM_PYTHON:-python3}

missing=$("$python" - tests/upstream/requirements.txt <<'PY' || echo "no $python"
import importlib.metadata as metadata, sys
wanted = [line.split("==") for line in open(sys.argv[1]).read().split() if "==" in line]
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
print(", ".join(f"{name} {version(name)} (wanted {v})" for name, v in wanted if version(name).split("+")[0] != v), end="")
PY
)
if [[ -n $missing ]]; then
    echo "upstream check: NOT RUN: $missing"
    exit 0
fi
"$python" tests/upstream/check.py "$@"
