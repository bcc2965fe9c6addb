#!/usr/bin/env python3
"""A step of QLoRA training beside bitsandbytes and PEFT, on the CPU.

    python benches/training/training.py [--size 2048] [--rank 16] [--batches 16,64,256] [--threads 1,2] [--seconds 4]

Needs the packages of tests/upstream/requirements.txt, and cargo. One linear layer, NF4 with double quantization and
blocks of 64, all in f32: forward, backward with a given gradient of the outputs, and AdamW on A and B; with and without
the gradient of the input. The layers take turns, step by step, so that what disturbs the machine disturbs all alike, and
a pause after each step lets the threads of the last one go to sleep. Printed are medians in milliseconds, and how many
times as fast as with bitsandbytes a whole step is.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARITHMETICS = ["f32", "16x4"]
PAUSE = 0.005


def numbers(text):
    return [int(number) for number in text.split(",")]


class Ours:
    """A layer of nf4 in a process of its own, which has as many threads as it was started with."""

    def __init__(self, program, threads, size, rank, batch, arithmetic):
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen([program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = self.ask(f"layer {size} {rank} {batch} {arithmetic}")
        assert answer == "ready", answer

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def step(self, dx):
        return [float(ms) for ms in self.ask(f"step {int(dx)}").split()]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Theirs:
    """A Linear4bit of bitsandbytes with an adapter of PEFT."""

    def __init__(self, size, rank, batch):
        import bitsandbytes
        import peft
        import torch

        torch.manual_seed(1)
        model = torch.nn.Sequential(
            bitsandbytes.nn.Linear4bit(size, size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        ).to("cpu")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], lora_dropout=0.0)
        self.model = peft.get_peft_model(model, config)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        assert sum(weight.numel() for weight in weights) == 2 * size * rank
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4)
        self.x, self.dy = torch.randn(batch, size), torch.randn(batch, size)

    def step(self, dx):
        start = time.perf_counter()
        x = self.x.detach().requires_grad_(dx)
        y = self.model(x)
        forward = time.perf_counter()
        self.optimizer.zero_grad()
        y.backward(self.dy)
        backward = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        assert (x.grad is not None) == dx
        return [1e3 * (forward - start), 1e3 * (backward - forward), 1e3 * (end - backward)]


def build():
    command = ["cargo", "build", "--release", "--locked", "-p", "nf4-benches", "--features", "rayon", "--bin", "training"]
    subprocess.run(command, cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / "training"


def measure(layers, dx, seconds):
    """Medians of the parts of a step and of its sum, of each layer."""
    times = {name: [] for name in layers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 7:
        for name, layer in layers.items():
            parts = layer.step(dx)
            times[name].append([*parts, sum(parts)])
            time.sleep(PAUSE)
    # The first steps allocate.
    return {name: [statistics.median(part) for part in zip(*rows[2:])] for name, rows in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=numbers, default=[16, 64, 256])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="for each line of the table")
    options = parser.parse_args()
    program = build()
    import torch

    print(f"{options.size} x {options.size}, rank {options.rank}; milliseconds: forward + backward + AdamW = step")
    theirs = "bitsandbytes + PEFT"
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            layers = {theirs: Theirs(options.size, options.rank, batch)}
            for arithmetic in ARITHMETICS:
                layers[f"nf4 {arithmetic}"] = Ours(program, threads, options.size, options.rank, batch, arithmetic)
            for dx in (True, False):
                medians = measure(layers, dx, options.seconds)
                print(f"threads {threads}, batch {batch}, {'with' if dx else 'without'} the input's gradient")
                for name, parts in medians.items():
                    forward, backward, optimizer, step = parts
                    times = medians[theirs][3] / step
                    print(f"  {name:20}{forward:8.2f} +{backward:8.2f} +{optimizer:6.2f} ={step:8.2f}   {times:5.2f} times")
            sys.stdout.flush()
            for layer in layers.values():
                if isinstance(layer, Ours):
                    layer.close()


if __name__ == "__main__":
    main()
