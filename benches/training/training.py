#!/usr/bin/env python3
"""A step of QLoRA training beside bitsandbytes and PEFT, on the CPU.

    python benches/training/training.py [--size 2048] [--rank 16] [--batches 16,64,256] [--threads 1,2] [--seconds 4]
    python benches/training/training.py --check

Needs the packages of tests/upstream/requirements.txt, and cargo. One linear layer, NF4 with double quantization and
blocks of 64, all in f32: forward, backward with a given gradient of the outputs, and AdamW on A and B; with and without
the gradient of the input. The layers take turns, so that what disturbs the machine disturbs all alike. In a turn, steps
follow one another, as in training; the first wakes the threads, and is not timed. The pause after a turn is for the
threads of OpenMP, which look for work for a while before they sleep. Printed are medians in milliseconds, and how many
times as fast as with bitsandbytes a whole step is. With --check nothing is timed: outputs and gradients of a small layer
are compared with those of bitsandbytes and PEFT, and a difference is a failure.
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
STEPS_OF_A_TURN = 4
PAUSE = 0.03


def numbers(text):
    return [int(number) for number in text.split(",")]


def series(scale, rows, cols):
    """The values that main.rs makes too, to the bit."""
    import torch

    scale = torch.tensor(scale)
    return (torch.arange(rows * cols) % 1009 * scale - 504 * scale).reshape(rows, cols)


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

    def values(self, name):
        return [float(value) for value in self.ask(f"values {name}").split()]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Theirs:
    """A Linear4bit of bitsandbytes with an adapter of PEFT."""

    def __init__(self, size, rank, batch):
        import bitsandbytes
        import peft
        import torch

        linear = bitsandbytes.nn.Linear4bit(size, size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        linear.weight.data = series(1e-4, size, size)
        model = torch.nn.Sequential(linear).to("cpu")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], lora_dropout=0.0)
        self.model = peft.get_peft_model(model, config)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        assert [weight.shape for weight in weights] == [(rank, size), (size, rank)]
        self.a, self.b = weights
        self.a.data, self.b.data = series(1e-4, rank, size), series(2e-5, size, rank)
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4)
        self.x, self.dy = series(2e-3, batch, size), series(1e-3, batch, size)

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
        self.left = {"y": y, "dx": x.grad, "da": self.a.grad, "db": self.b.grad}
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
    while time.perf_counter() < end or min(map(len, times.values())) < 5 * STEPS_OF_A_TURN:
        for name, layer in layers.items():
            layer.step(dx)
            for _ in range(STEPS_OF_A_TURN):
                parts = layer.step(dx)
                times[name].append([*parts, sum(parts)])
            time.sleep(PAUSE)
    # The first turn allocates.
    return {name: [statistics.median(part) for part in zip(*rows[STEPS_OF_A_TURN:])] for name, rows in times.items()}


def check(program):
    """Whether outputs and gradients agree: to 1e-5 of the largest value in f32, to 1e-3 with the 16x4 forward."""
    good, size, rank, batch = True, 256, 8, 24
    theirs = Theirs(size, rank, batch)
    theirs.step(True)
    for arithmetic, tolerance in zip(ARITHMETICS, [1e-5, 1e-3]):
        ours = Ours(program, 2, size, rank, batch, arithmetic)
        ours.step(True)
        for name, exact in theirs.left.items():
            exact = exact.detach().flatten().tolist()
            values, largest = ours.values(name), max(map(abs, exact))
            off = max(abs(a - b) for a, b in zip(values, exact, strict=True)) / largest
            fine = largest > 0 and off < tolerance
            good &= fine
            print(f"{'ok    ' if fine else 'FAILED'} training {arithmetic} {name}: {off:.1e} of the largest value")
        ours.close()
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=numbers, default=[16, 64, 256])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="for each line of the table")
    parser.add_argument("--check", action="store_true", help="compare values, and time nothing")
    options = parser.parse_args()
    program = build()
    if options.check:
        sys.exit(not check(program))
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
