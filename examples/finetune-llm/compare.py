#!/usr/bin/env python3
"""The same steps of training with finetune-llm and with transformers, bitsandbytes and PEFT.

    python compare.py MODEL TEXT [--steps 20] [--context 128] [--threads 1,2] [--rounds 1] [--dora] [--tolerance 1e-4]

Needs the packages of tests/upstream/requirements.txt, and cargo. MODEL is a quantized directory, TEXT a text file. Both sides
start from the adapter that finetune-llm made, rank 8 on all linear layers, and see the same sequences, one a step; all is f32,
but for the 16x4 arithmetic of the forward in a third run. Each run is a process of its own, and they take turns. Printed are the
losses, the largest relative difference from PEFT's, the mean seconds of a step and the peak memory of the process, as medians
over the rounds. Fails if a loss of the f32 run differs by more than the tolerance.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
THEIRS = "bitsandbytes + PEFT"
ARITHMETICS = ["f32", "16x4"]


def build():
    command = ["cargo", "build", "--release", "--locked", "--bin", "finetune-llm"]
    subprocess.run(command, cwd=HERE, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parents[1] / "candle" / "target"))
    return target / "release" / "finetune-llm"


def measured(command, threads, log):
    """Runs a process to its end; its peak memory in MB. This process has to stay small: what it has counts for its children."""
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    if threads < os.cpu_count():
        # For the threads of bitsandbytes. With as many as there are CPUs, setting it made a step take 6.8 s in place of 0.8.
        env["OMP_NUM_THREADS"] = str(threads)
    with open(log, "w+", encoding="utf-8") as said:
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = Path(log).read_text(encoding="utf-8")
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{text}")
    return text, usage.ru_maxrss / 1024


class Comparison:
    """What all runs share, in a folder of its own."""

    def __init__(self, options, folder):
        self.options, self.folder, self.program = options, folder, build()
        self.batches = folder / "batches.jsonl"
        text, _ = measured([*self.command("f32", folder / "none"), "--write-batches", self.batches], 1, folder / "log")
        self.tokens = sum(len(json.loads(line)["tokens"]) for line in open(self.batches, encoding="utf-8"))

    def command(self, arithmetic, out):
        options = self.options
        return [
            *(self.program, options.model, options.text, "--out", out, "--arithmetic", arithmetic, "--accumulate", 1),
            *("--steps", options.steps, "--evaluate-every", options.steps, "--context", options.context),
            *("--learning-rate", options.learning_rate, "--warmup", 2, *["--dora"] * options.dora),
        ]

    def ours(self, arithmetic, threads, name):
        """Losses, seconds of a step, and MB."""
        out = self.folder / name
        text, memory = measured(self.command(arithmetic, out), threads, self.folder / "log")
        speed = int(re.findall(r"(\d+) tokens/s", text)[-1])
        losses = json.loads((out / "losses.json").read_text())["training"]
        return losses, self.tokens / speed / len(losses), memory

    def theirs(self, threads, run):
        options = self.options
        command = [sys.executable, __file__, "--peft", options.model, self.folder / run, self.batches, threads]
        text, memory = measured(command, threads, self.folder / "log")
        result = json.loads(text.splitlines()[-1])
        return result["losses"], statistics.mean(result["seconds"]), memory


def peft(model, run, batches, threads):
    """The steps of the run in the directory `run`, with its settings; prints losses and seconds."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    settings = json.loads(bytes(load_file(Path(run) / "checkpoint.safetensors")["run"]))["settings"]
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # What the file has in f16 stays so, whatever `dtype` says: the head, whose gradient in f16 takes ten times as long as all else.
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32
    model = PeftModel.from_pretrained(model, Path(run) / "adapter-000000", is_trainable=True)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=settings["weight_decay"])
    peak, warmup, steps = settings["learning_rate"], settings["warmup"], settings["steps"]

    def rate(step):
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    losses, seconds = [], []
    with open(batches, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            assert line["places"] == list(range(len(line["tokens"]) - 1)), "not one document of which all is learned"
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = rate(line["step"])
            tokens = torch.tensor([line["tokens"]])
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings["clip"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"losses": losses, "seconds": seconds}))


def difference(losses, exact):
    return max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()

    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(options, Path(folder))
        for threads in options.threads:
            results = {name: [] for name in [*ARITHMETICS, THEIRS]}
            for round in range(options.rounds):
                for arithmetic in ARITHMETICS:
                    name = f"{arithmetic}-{threads}-{round}"
                    results[arithmetic].append(comparison.ours(arithmetic, threads, name))
                results[THEIRS].append(comparison.theirs(threads, f"f32-{threads}-{round}"))
            f32, quantized, exact = (runs[0][0] for runs in results.values())
            if threads == options.threads[0]:
                print("losses: bitsandbytes + PEFT, nf4 f32, nf4 16x4")
                for step, losses in enumerate(zip(exact, f32, quantized), 1):
                    print(f"{step:4}", *(f"{loss:.6f}" for loss in losses))
            worst = max(worst, difference(f32, exact))
            theirs = [statistics.median(run[part] for run in results[THEIRS]) for part in (1, 2)]
            print(f"threads {threads}: s per step, MB; times as fast, part of the memory, largest difference of a loss")
            for name, runs in results.items():
                seconds, memory = (statistics.median(run[part] for run in runs) for part in (1, 2))
                times, part, off = theirs[0] / seconds, memory / theirs[1], difference(runs[0][0], exact)
                print(f"  {name:20}{seconds:7.3f}{memory:7.0f}{times:7.2f}{part:7.2f}  {off:.1e}", flush=True)
    return worst > options.tolerance


if __name__ == "__main__":
    sys.exit(peft(*sys.argv[2:]) if sys.argv[1:2] == ["--peft"] else main())
