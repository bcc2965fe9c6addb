"""Makes the tiny models of this folder: random weights, one of each family, quantized and run by transformers and
bitsandbytes in f32, and in f64 on the dequantized weights.

    python make_tiny.py        # packages: tests/upstream/requirements.txt

Each folder NAME has what transformers saves, and reference.safetensors: `ids` [T] and `exact` [T, vocabulary], the logits
in f64, rounded to f32. `llama` also has two adapters of PEFT, with `adapter_A.exact`. `mistral` is a bf16 checkpoint in
shards with a linear layer that was not quantized, `qwen2` an f16 one.
"""
import json, pathlib, shutil
import torch
import bitsandbytes as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, AddedToken
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# Where the CPU has bf16 products, bitsandbytes would use them for f32 too.
bnb.nn.modules.has_avx512bf16 = lambda: False
HERE = pathlib.Path(__file__).parent
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=257)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
SKIPPED = "model.layers.1.mlp.down_proj"
# Configuration, type, double quantization, modules that stay dense, size of a shard.
MODELS = {
    "llama": (LlamaConfig(**SIZES, vocab_size=260, rope_parameters=LLAMA3, tie_word_embeddings=True), "float32", True, None, "1GB"),
    "mistral": (MistralConfig(**SIZES, vocab_size=258, head_dim=32, sliding_window=None), "bfloat16", False, ["lm_head", SKIPPED], "60KB"),
    "qwen2": (Qwen2Config(**SIZES, vocab_size=258, tie_word_embeddings=True), "float16", True, None, "1GB"),
    "qwen3": (Qwen3Config(**SIZES, vocab_size=258, head_dim=32), "float32", False, None, "1GB"),
}
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + "
            "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def random_weights(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.5 if "embed" in name else p.shape[1] ** -0.5))


def dequantized(model):
    """The same model in f64, on the weights that the 4-bit layers stand for."""
    exact = AutoModelForCausalLM.from_config(model.config).double()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            quant_state = module.weight.quant_state
            quant_state.dtype = torch.float32  # not rounded to the type of the checkpoint
            state[name + ".weight"] = bnb.functional.dequantize_4bit(module.weight.data, quant_state).double()
            if module.bias is not None:
                state[name + ".bias"] = module.bias.data.double()
    for name, p in model.named_parameters():
        if p.is_floating_point() and name not in state:
            state[name] = p.data.double()
    missing, unexpected = exact.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in m for m in missing), (missing, unexpected)
    exact.tie_weights()
    return exact.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0]


def tokenizer(folder):
    """Bytes, and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True) for s in ["<|im_start|>", "<|im_end|>"]])
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}, indent=2) + "\n")


def adapters(model, folder, ids, reference):
    for i, (name, options) in enumerate({
        "one": dict(r=4, lora_alpha=8, target_modules="all-linear"),
        "two": dict(r=2, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    }.items()):
        exact = dequantized(model)
        peft = get_peft_model(exact.float(), LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(100 + i)
        with torch.no_grad():
            for n, p in peft.named_parameters():
                if "lora_B" in n:
                    p.copy_(0.2 * torch.randn_like(p))
        peft.save_pretrained(str(folder / f"adapter_{name}"))
        (folder / f"adapter_{name}" / "README.md").unlink(missing_ok=True)
        reference[f"adapter_{name}.exact"] = logits(peft.double(), ids).float().contiguous()


def main():
    for seed, (name, (config, dtype, double, skip, shard)) in enumerate(MODELS.items()):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        dtype = getattr(torch, dtype)
        dense = AutoModelForCausalLM.from_config(config).float()
        random_weights(dense, seed)
        dense.to(dtype).save_pretrained(str(folder / "dense"))
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                          bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skip)
        model = AutoModelForCausalLM.from_pretrained(str(folder / "dense"), quantization_config=quantization,
                                                     dtype=dtype, device_map="cpu").eval()
        shutil.rmtree(folder / "dense")
        model.save_pretrained(str(folder), max_shard_size=shard)
        torch.manual_seed(1000 + seed)
        ids = torch.randint(0, 256, (70,))  # more than a span of 64 positions
        exact = logits(dequantized(model), ids)
        reference = {"ids": ids.int(), "exact": exact.float().contiguous()}
        if dtype == torch.float32:
            print(name, "f32 of bitsandbytes off by", (logits(model, ids) - exact).abs().max().item(),
                  "of rms", exact.square().mean().sqrt().item())
        if name == "llama":
            adapters(model, folder, ids, reference)
            tokenizer(folder)
        save_file(reference, str(folder / "reference.safetensors"))


if __name__ == "__main__":
    main()
