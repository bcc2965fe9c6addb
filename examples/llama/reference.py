"""Makes the reference that `compare` reads, with transformers, bitsandbytes and PEFT.

    python reference.py MODEL OUT [--adapter DIR] [--text FILE]...    # packages: tests/upstream/requirements.txt

MODEL is a directory that is not quantized; of it, `nf4 quantize` gives the bytes of bitsandbytes. It is quantized here in
f32, twice: plain (case `nf4`) and with double quantization (`nf4_dq`); with an adapter also `nf4_adapter`. For each prompt:
logits of bitsandbytes in f32 and in f64 on the dequantized weights, and 64 greedy tokens; for each text the perplexity.
"""
import argparse, json, math, pathlib, shutil, tempfile
import torch
import bitsandbytes as bnb
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# Where the CPU has bf16 products, bitsandbytes would use them for f32 too.
bnb.nn.modules.has_avx512bf16 = lambda: False
TOP, STEPS, TOKENS = 16, 64, 2048
PROMPTS = {"chat_sky": "Why is the sky blue? Explain it for a child.",
           "chat_story": "Tell me a short story about a fox who learns to swim."}


def quantized(folder, double):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu").eval()


def exact(model, folder):
    """The same model in f64, on the weights that the 4-bit layers stand for."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    layers = dict(dense.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            layers[name].weight.data = weight.double()
    return dense


@torch.no_grad()
def compare(model, dense, ids, name, tensors):
    logits, truth = model(ids[None]).logits[0], dense(ids[None]).logits[0]
    places = logits.topk(TOP).indices
    tensors[f"{name}.logits.top.ids"] = places.int()
    tensors[f"{name}.exact.top.values"] = truth.gather(1, places).float()
    greedy, top2 = [], []
    for _ in range(STEPS):
        row = dense(torch.cat([ids, torch.tensor(greedy, dtype=ids.dtype)])[None]).logits[0, -1]
        best = row.topk(2)
        greedy.append(best.indices[0].item())
        top2.append(best.values.float())
    tensors[f"{name}.greedy.ids"] = torch.tensor(greedy, dtype=torch.int32)
    tensors[f"{name}.exact.greedy.top2"] = torch.stack(top2)
    error = (logits - truth).abs()
    print(f"{name}: the f32 of bitsandbytes is off by at most {error.max():.1e}, rms {error.square().mean().sqrt():.1e}")


@torch.no_grad()
def perplexity(model, ids):
    loss = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:])
    return math.exp(loss.item())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--adapter"), parser.add_argument("--text", action="append", default=[], type=pathlib.Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    manifest = {"model": args.model, "prompts": {}, "cases": {}, "perplexity": {}}
    for name, text in PROMPTS.items():
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        manifest["prompts"][name] = {"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids}
    with tempfile.TemporaryDirectory() as folder:
        # An f32 copy: a model in f16 would be multiplied in f16.
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).save_pretrained(folder)
        for case, double in [("nf4", False), ("nf4_dq", True), ("nf4_adapter", False)]:
            if case == "nf4_adapter" and not args.adapter:
                continue
            model, tensors = quantized(folder, double), {}
            dense = exact(model, folder)
            label = "NF4 double quant, f32 compute" if double else "NF4, f32 compute"
            if case == "nf4_adapter":
                model = PeftModel.from_pretrained(model, args.adapter).eval()
                dense = PeftModel.from_pretrained(dense, args.adapter).double().eval()
            else:
                for path in args.text:
                    ids = tokenizer(path.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0][:TOKENS]
                    entry = manifest["perplexity"].setdefault(path.stem, {"file": path.name, "tokens": len(ids), "results": {}})
                    entry["results"][label] = {"perplexity": perplexity(model, ids)}
                    if path.resolve() != (args.out / path.name).resolve():
                        shutil.copy(path, args.out / path.name)
            for name, prompt in manifest["prompts"].items():
                compare(model, dense, torch.tensor(prompt["ids"]), name, tensors)
            manifest["cases"][case] = {"file": f"{case}.safetensors"}
            save_file(tensors, str(args.out / f"{case}.safetensors"))
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
