"""Makes the reference that `compare` reads, with transformers, bitsandbytes and PEFT.

    python reference.py MODEL OUT [--text FILE]... [--tokens N] [--steps N]    # packages: tests/upstream/requirements.txt

MODEL is a directory that is not quantized; of it, `nf4 quantize` gives the bytes of bitsandbytes. It is quantized here in
f32: plain (case `nf4`), with double quantization (`nf4_dq`), and with two adapters that are made here of random numbers
(`lora` and `dora`, in OUT/adapters). For each prompt: logits of bitsandbytes in f32, and in f64 on the dequantized weights,
and greedy tokens; for each text its perplexity in both, and all logits in f64, with which `compare` computes divergences.
"""
import argparse, json, math, pathlib, shutil, tempfile
import torch
import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# Where the CPU has bf16 products, bitsandbytes would use them for f32 too.
bnb.nn.modules.has_avx512bf16 = lambda: False
TOP = 16
PROMPTS = {"chat_sky": "Why is the sky blue? Explain it for a child.",
           "chat_story": "Tell me a short story about a fox who learns to swim."}
ADAPTERS = {"lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            "dora": LoraConfig(r=4, lora_alpha=4, use_rslora=True, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"],
                               task_type="CAUSAL_LM")}


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


def make_adapters(folder, out):
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
        peft.save_pretrained(out / "adapters" / name)


@torch.no_grad()
def compare(model, dense, ids, steps, name, tensors):
    logits, truth = model(ids[None]).logits[0], dense(ids[None], use_cache=True)
    past, truth = truth.past_key_values, truth.logits[0]
    places = logits.topk(TOP).indices
    tensors[f"{name}.logits.top.ids"] = places.int()
    tensors[f"{name}.logits.top.values"] = logits.gather(1, places).contiguous()
    tensors[f"{name}.exact.top.values"] = truth.gather(1, places).float()
    greedy, top2, row = [], [], truth[-1]
    for _ in range(steps):
        best = row.topk(2)
        greedy.append(best.indices[0].item())
        top2.append(best.values.float())
        row = dense(torch.tensor([[greedy[-1]]]), past_key_values=past, use_cache=True).logits[0, -1]
    tensors[f"{name}.greedy.ids"] = torch.tensor(greedy, dtype=torch.int32)
    tensors[f"{name}.exact.greedy.top2"] = torch.stack(top2)
    error = (logits - truth).abs()
    print(f"{name}: the f32 of bitsandbytes is off by at most {error.max():.1e}, rms {error.square().mean().sqrt():.1e}")


def perplexity(logits, ids):
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]).item())


@torch.no_grad()
def read_texts(model, dense, texts, tokenizer, args, case, manifest):
    """Perplexities, and all logits in f64, rounded to f32."""
    label = "NF4 double quant, f32 compute" if case == "nf4_dq" else "NF4, f32 compute"
    for path in texts:
        ids = tokenizer(path.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0][:args.tokens]
        entry = manifest["perplexity"].setdefault(path.stem, {"file": path.name, "tokens": len(ids), "results": {}, "logits": {}})
        truth = dense(ids[None]).logits[0]
        result = {"perplexity": perplexity(model(ids[None]).logits[0], ids), "exact": perplexity(truth, ids)}
        print(f"{case}, {path.stem}: perplexity of bitsandbytes {result['perplexity']:.4f}, in f64 {result['exact']:.4f}")
        entry["results"][label] = result
        entry["logits"][case] = f"{case}.{path.stem}.safetensors"
        save_file({"logits": truth.float()}, args.out / entry["logits"][case])
        if path.resolve() != (args.out / path.name).resolve():
            shutil.copy(path, args.out / path.name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--text", action="append", default=[], type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--steps", type=int, default=64, help="greedy tokens")
    parser.add_argument("--cases", nargs="+", default=["nf4", "nf4_dq", *ADAPTERS])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    manifest = {"prompts": {}, "cases": {}, "perplexity": {}}
    for name, text in PROMPTS.items():
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        manifest["prompts"][name] = {"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids}
    with tempfile.TemporaryDirectory() as folder:
        # An f32 copy: a model in f16 would be multiplied in f16.
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).save_pretrained(folder)
        make_adapters(folder, args.out)
        for case in args.cases:
            model, tensors = quantized(folder, case == "nf4_dq"), {}
            dense = exact(model, folder)
            if case in ADAPTERS:
                adapter = args.out / "adapters" / case
                model = PeftModel.from_pretrained(model, adapter).eval()
                dense = PeftModel.from_pretrained(dense, adapter, autocast_adapter_dtype=False).double().eval()
            else:
                read_texts(model, dense, args.text, tokenizer, args, case, manifest)
            for name, prompt in manifest["prompts"].items():
                print(case, end=", ")
                compare(model, dense, torch.tensor(prompt["ids"]), args.steps, name, tensors)
            manifest["cases"][case] = {"file": f"{case}.safetensors"}
            save_file(tensors, args.out / f"{case}.safetensors")
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
