#!/usr/bin/env python3
"""Do the real libraries load what nf4 writes, and do they get the same bits?

    python tests/upstream/check.py [--nf4 PATH] [--write-checkpoint PATH] [--keep DIR]

bitsandbytes, PEFT, transformers and gguf (requirements.txt) load layers, quantized models, adapters, merged models and
GGUF files that the tool `nf4` and the example `write_checkpoint` make of a tiny Llama, and what they load is compared
bit for bit; models of other architectures are in families.py. Without the two paths both are built with cargo. Exit status 0
if everything agrees.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

import bitsandbytes as bnb
import gguf
import numpy as np
import peft
import safetensors
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import families

transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[2]
failures = 0


def check(what, good, detail=""):
    """One line a check."""
    global failures
    failures += not good
    print(f"{'ok    ' if good else 'FAILED'} {what}{'' if good else ': ' + str(detail)}", flush=True)


def same_bits(a, b):
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def build(args):
    """The tool and the example."""
    if not (args.nf4 and args.write_checkpoint):
        command = ["cargo", "build", "--release", "--bin", "nf4", "--example", "write_checkpoint"]
        subprocess.run(command, cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return args.nf4 or target / "nf4", args.write_checkpoint or target / "examples/write_checkpoint"


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def tiny_llama(path):
    """A dense model of the shape of the reference's, with random weights."""
    config = json.loads((ROOT / "tests/data/reference/linear4bit/tiny_llama/config.json").read_text())
    config.pop("quantization_config")
    # So that no block straddles rows, see `restore`: the forward of Linear4bit fails on them where it uses AVX-512.
    config["intermediate_size"] = 128
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) / p.shape[1] ** 0.5)
    model.save_pretrained(path)


def logits(model):
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # in f32 on every machine
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6) * 3 % 48).logits


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def restore(data, state):
    """The weight that bitsandbytes restores.

    Where it uses AVX-512, its native code takes wrong scales if blocks straddle rows; there its portable code is asked.
    """
    if not (AVX512 and state.shape[-1] % state.blocksize):
        return dequantize_4bit(data, state)
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(
        data.view(torch.uint8).reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


# --- one layer

def layers(out):
    for file in sorted((out / "layer").glob("*.safetensors")):
        if file.stem.endswith(".restored"):
            continue
        state = load_file(file)
        restored = load_file(file.with_name(file.stem + ".restored.safetensors"))["weight"]
        stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        param = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
        quant = param.quant_state
        quant.dtype, dtype = torch.float32, quant.dtype
        got = restore(param.data, quant)
        check(f"layer {file.stem}: bitsandbytes restores the bits that nf4 restores", same_bits(got, restored))

        # What bitsandbytes makes of a layer with these values is what nf4 wrote.
        rows, cols = restored.shape
        layer = bnb.nn.Linear4bit(cols, rows, bias="bias" in state, quant_type="nf4", quant_storage=param.data.dtype)
        quant.dtype = dtype
        layer.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], {
            k.removeprefix("weight."): v for k, v in load_file(file).items() if k.startswith("weight.")
        }, device="cpu", module=layer)
        if "bias" in state:
            layer.bias = torch.nn.Parameter(state["bias"])
        again = layer.state_dict()
        good = again.keys() == state.keys() and all(same_bits(again[k], load_file(file)[k]) for k in again)
        check(f"layer {file.stem}: Linear4bit.state_dict() gives the tensors that nf4 wrote", good,
              sorted(again.keys() ^ state.keys()))


# --- models

def models(nf4, dense, work):
    for name, flags, double in [("plain", [], False), ("nested", ["--double-quant"], True)]:
        ours, restored, theirs = work / name, work / f"{name}_restored", work / f"{name}_theirs"
        run(nf4, "quantize", dense, "--out", ours, *flags)
        run(nf4, "dequantize", ours, "--out", restored, "--dtype", "f32")
        loaded = AutoModelForCausalLM.from_pretrained(ours, device_map="cpu", dtype=torch.float32)
        linears = {n: m for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        check(f"model {name}: transformers makes Linear4bit of all {len(linears)} layers", len(linears) == 7)
        weights = load_file(restored / "model.safetensors")
        good = all(same_bits(restore(m.weight.data, m.weight.quant_state), weights[n + ".weight"])
                   for n, m in linears.items())
        check(f"model {name}: each layer restores to the bits of nf4 dequantize", good)

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
        reference = AutoModelForCausalLM.from_pretrained(
            dense, device_map="cpu", dtype=torch.float32, quantization_config=config)
        reference.save_pretrained(theirs)
        a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
        wrong = [k for k in a.keys() | b.keys() if k not in a or k not in b or not same_bits(a[k], b[k])]
        check(f"model {name}: the {len(b)} tensors are those that transformers itself writes", not wrong, wrong)
        check(f"model {name}: the same logits", same_bits(logits(loaded), logits(reference)))
        check(f"model {name}: the restored model loads without bitsandbytes",
              not any(isinstance(m, bnb.nn.Linear4bit) for m in
                      AutoModelForCausalLM.from_pretrained(restored, dtype=torch.float32).modules()))


# --- adapters

def merged_exactly(weight, tensors, module, scale):
    """The merged weight, in float64, rounded once; the scale is an f32 in nf4."""
    key = f"base_model.model.{module}."
    a, b = (tensors[f"{key}lora_{x}.weight"].double().numpy() for x in "AB")
    merged = weight.double().numpy() + float(np.float32(scale)) * (b @ a)
    if f"{key}lora_magnitude_vector" in tensors:
        gain = tensors[f"{key}lora_magnitude_vector"].double().numpy() / np.linalg.norm(merged, axis=1)
        merged = gain[:, None] * merged
    return merged.astype(np.float32)


def ulps(a, b):
    """The largest difference in units of the last place."""
    order = lambda x: np.where((i := x.view(np.int32).astype(np.int64)) < 0, -(2 ** 31) - i, i)
    return int(np.abs(order(a) - order(b)).max())


def adapters(nf4, dense, out, work):
    base = load_file(work / "nested_restored/model.safetensors")
    for path in sorted((out / "adapter").iterdir()):
        name = path.name
        tensors = load_file(path / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(work / "nested", device_map="cpu", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)
        lora = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()
                if isinstance(m, peft.tuners.lora.LoraLayer)}
        found = sum(k.endswith("lora_A.weight") for k in tensors)
        check(f"adapter {name}: PEFT adapts all {found} layers", len(lora) == found == 7)

        # PEFT writes again what it has read, in the type of the base, which is f32.
        model.save_pretrained(work / f"again_{name}")
        again = load_file(work / f"again_{name}/adapter_model.safetensors")
        wrong = [k for k in again.keys() | tensors.keys()
                 if k not in again or k not in tensors or not same_bits(again[k], tensors[k].float())]
        check(f"adapter {name}: PEFT saves the {len(tensors)} tensors that nf4 wrote", not wrong, wrong)

        run(nf4, "merge", work / "nested", "--adapter", path, "--out", work / f"merged_{name}", "--dtype", "f32")
        merged = load_numpy(work / f"merged_{name}/model.safetensors")
        worst = max(ulps(merged[n + ".weight"], merged_exactly(base[n + ".weight"], tensors, n, m.scaling["default"]))
                    for n, m in lora.items())
        check(f"adapter {name}: nf4 merge is dequantize(W) + s B A with PEFT's s, rounded once (at most {worst} ulp)",
              worst <= 1)
        loaded = AutoModelForCausalLM.from_pretrained(work / f"merged_{name}", dtype=torch.float32)
        a, b = logits(loaded), logits(model.float())
        error = float((a - b).abs().max() / b.abs().max())
        check(f"adapter {name}: transformers loads the merged model; logits within {error:.1e} of PEFT on the 4-bit base",
              error < 1e-4)
        for dtype, torch_dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
            target = work / f"merged_{name}_{dtype}"
            run(nf4, "merge", work / "nested", "--adapter", path, "--out", target, "--dtype", dtype)
            state = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
            good = all(same_bits(state[k], torch.from_numpy(v).to(torch_dtype)) for k, v in merged.items())
            check(f"adapter {name}: the merged model in {dtype} is that in f32, rounded", good)


# --- merged models of the library, and GGUF

def merged_files(out, work):
    tool = load_file(work / "merged_standard/model.safetensors")
    for dtype, torch_dtype in [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]:
        state = load_file(out / f"{dtype}.safetensors")
        good = state.keys() == tool.keys() and all(same_bits(state[k], tool[k].to(torch_dtype)) for k in state)
        check(f"merged {dtype}: library and tool write the same {len(state)} tensors", good)
        reader = gguf.GGUFReader(out / f"{dtype}.gguf")
        architecture = reader.get_field("general.architecture").contents()
        check(f"gguf {dtype}: version 3, architecture and name",
              (architecture, reader.get_field("general.name").contents()) == ("llama", "merged"))
        file_type = reader.get_field("general.file_type").contents()
        expected = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[dtype]
        check(f"gguf {dtype}: the file type is {expected}", gguf.LlamaFileType(file_type).name == expected)
        read = {t.name: t for t in reader.tensors}
        good = read.keys() == state.keys() and all(
            list(reversed(t.shape.tolist())) == list(state[n].shape)
            and t.tensor_type.name == dtype.upper()
            and t.data.tobytes() == state[n].contiguous().view(torch.uint8).numpy().tobytes()
            for n, t in read.items())
        check(f"gguf {dtype}: gguf reads the same {len(read)} tensors, shapes and bits", good)


# --- architectures

def architectures(nf4, work):
    """One line each."""
    def tool(*command):
        done = subprocess.run([str(c) for c in (nf4, *command)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")

    for at, (name, cls, settings) in enumerate(families.FAMILIES):
        folder = work / f"family{at}"
        folder.mkdir()
        wrong, layers = families.check(cls, settings, tool, restore, same_bits, folder)
        what = f"{name}: {layers}"
        check(f"architecture {what}: quantize, dequantize, merge of an adapter on all layers and on the head", not wrong, wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nf4", type=Path, help="the tool")
    parser.add_argument("--write-checkpoint", type=Path, help="the example")
    parser.add_argument("--keep", type=Path, help="make the files here, and keep them")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}, safetensors {safetensors.__version__}")
    nf4, write_checkpoint = build(args)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(exist_ok=True)
        dense, out = work / "dense", work / "out"
        tiny_llama(dense)
        run(write_checkpoint, dense / "model.safetensors", out)
        layers(out)
        models(nf4, dense, work)
        adapters(nf4, dense, out, work)
        merged_files(out, work)
        architectures(nf4, work)
    print("upstream check: " + (f"{failures} FAILED" if failures else "everything agrees"))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
