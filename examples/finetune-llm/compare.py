"""Makes the steps of a run again with transformers, bitsandbytes and PEFT, and compares the losses.

    python compare.py MODEL RUN BATCHES [--steps N] [--threads N] [--tolerance T]

MODEL is the quantized directory, RUN the directory of the run, with the adapter that it started with (adapter-000000) and the losses,
BATCHES what `--write-batches` wrote with the same arguments. Sequences must be single documents, as those of a text are. Prints the
losses, the largest difference, the seconds of a step (median) and the peak of the memory; fails if a loss differs by more than the
tolerance, relative.
"""

import argparse
import json
import math
import pathlib
import resource
import statistics
import sys
import time


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("batches")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=2e-3)
    arguments = parser.parse_args()

    import torch
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    settings = json.loads(bytes(load_file(arguments.run / "checkpoint.safetensors")["run"]))["settings"]
    expected = json.loads((arguments.run / "losses.json").read_text())["training"]
    steps = {}
    with open(arguments.batches, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            steps.setdefault(line["step"], []).append(line)

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, arguments.run / "adapter-000000", is_trainable=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=settings["weight_decay"])
    print(f"{sum(p.numel() for p in trained)} parameters are trained")

    warmup, all_steps = settings["warmup"], settings["steps"]

    def rate(step):
        if step < warmup:
            return settings["learning_rate"] * (step + 1) / warmup
        part = min((step - warmup) / max(all_steps - warmup, 1), 1.0)
        return settings["learning_rate"] * 0.5 * (1 + math.cos(math.pi * part))

    worst, times = 0.0, []
    for step in range(min(arguments.steps, len(expected))):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        count = sum(len(sequence["targets"]) for sequence in steps[step])
        total = 0.0
        for sequence in steps[step]:
            assert len(sequence["documents"]) == 1, "a sequence has several documents"
            logits = model(input_ids=torch.tensor([sequence["tokens"]]), use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[torch.tensor(sequence["places"])], torch.tensor(sequence["targets"]), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        got = total / count
        worst = max(worst, abs(got - expected[step]) / got)
        print(f"step {step + 1}: transformers {got:.6f}, nf4 {expected[step]:.6f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"largest difference {worst:.1e}, relative; {statistics.median(times):.3f} s per step; peak memory {peak:.0f} MB")
    return worst > arguments.tolerance


if __name__ == "__main__":
    sys.exit(main())
