"""Tokens per second beside transformers, bitsandbytes and llama.cpp, on the same model, in turn.

    python speed.py MODEL [--gguf FILE] [--rounds N] [--json FILE]    # packages: tests/upstream/requirements.txt

MODEL is a directory that is not quantized; MODEL-nf4, beside it, is what `nf4 quantize` makes of it. Programs must be built:

    cargo build --release                                                       # here
    cargo build --release --bin llama_cpp                                       # in benches/peers, for --gguf

In each round, each program reads a prompt of 512 tokens, and then decodes from an almost empty cache: 64 tokens, and 16 with
transformers. The table has the medians of all rounds; --json keeps them, and adds to those of the runs before.
"""
import argparse, json, os, pathlib, re, statistics, subprocess, sys, time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
DECODED = 16


def transformers(model, threads, kind):
    """In a process of its own: prints what the other programs print."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    torch.set_num_threads(threads)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    config = {"quantization_config": config} if kind == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, device_map="cpu", **config).eval()
    prompt = torch.tensor([[i * 2654435761 % 2**32 % model.config.vocab_size for i in range(512)]])
    with torch.no_grad():
        out = model(prompt[:, :16], use_cache=True, logits_to_keep=1)  # what the first call prepares
        start = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        print(f"{threads} threads, prompt of 512: {512 / (time.perf_counter() - start):.1f} tokens/s")
        start = time.perf_counter()
        for _ in range(DECODED):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        print(f"{threads} threads, decoding: {DECODED / (time.perf_counter() - start):.1f} tokens/s")


def commands(args, threads):
    """Names of rows, and what measures them."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE / "target"))
    for arithmetic in ["f32", "16x4", "8x8"]:
        for head in ["keep", "nf4"]:
            name = f"nf4 {arithmetic}, head in {'f16' if head == 'keep' else 'NF4'}"
            yield name, [target / "release/llama", f"{args.model}-nf4", "--bench", "--repeats", "1", "--threads", threads,
                         "--arithmetic", arithmetic, "--head", head]
    if args.gguf:
        target = pathlib.Path(os.environ.get("PEERS_TARGET_DIR", ROOT / "benches/peers/target"))
        yield f"llama.cpp {args.gguf.stem.split('.')[-1]}", [target / "release/llama_cpp", args.gguf, threads]
    yield "transformers, f32", [sys.executable, __file__, args.model, "--inside", "f32", "--threads", threads]
    yield "bitsandbytes NF4", [sys.executable, __file__, args.model, "--inside", "nf4", "--threads", threads]


def measure(command):
    """Tokens per second of prompt and decoding."""
    out = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    rates = dict(re.findall(r"threads, (.*): ([0-9.]+) tokens/s", out.stdout))
    if len(rates) < 2:
        raise SystemExit(f"{command}\n{out.stdout}{out.stderr}")
    return [float(rates["decoding"]), float(rates["prompt of 512"])]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--gguf", type=pathlib.Path), parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5), parser.add_argument("--threads", default="2,1")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return transformers(args.model, int(args.threads), args.inside)
    counts = args.threads.split(",")
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for _ in range(args.rounds):
        for threads in counts:
            for name, command in commands(args, threads):
                rows.setdefault(name, {}).setdefault(threads, []).append(measure(command))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = list(next(iter(rows.values())))
    print("| | " + " | ".join(f"{what}, {n} threads" for what in ["decoding", "prompt of 512"] for n in counts) + " |")
    print("|---|" + "--:|" * (2 * len(counts)))
    for name, results in rows.items():
        medians = [statistics.median(r[i] for r in results[n]) for i in range(2) for n in counts]
        print(f"| {name} | " + " | ".join(f"{m:.0f}" if m >= 20 else f"{m:.1f}" for m in medians) + " |")


if __name__ == "__main__":
    main()
