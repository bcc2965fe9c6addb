#!/usr/bin/env python3
"""Makes those cases of tests/data/field whose right values are PEFT's: `right.safetensors` has the weights with which
PEFT's model computes, of modules that the adapter changes.

    python tests/upstream/field.py DIRECTORY [CASE ...]
"""
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig

TEXT = dict(vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)


def randomize(model, scale=0.2):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save.", "trainable_tokens_delta")):
                parameter.add_(torch.randn(parameter.shape) * scale)


def base(cls, settings, path, quantize=None):
    """A dense model, or a 4-bit one."""
    torch.manual_seed(len(path.parent.name))
    model = cls(cls.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.tie_weights()
    model.save_pretrained(path)
    if quantize:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **quantize)
        cls.from_pretrained(path, device_map="cpu", dtype=torch.float32, quantization_config=config).save_pretrained(path)
    return cls.from_pretrained(path, device_map="cpu", dtype=torch.float32)


def weight(module):
    """The matrix that a module multiplies by, or the rows that it gives, whatever adapts it."""
    inner = module
    while hasattr(inner, "base_layer") or hasattr(inner, "token_adapter"):
        inner = inner.base_layer if hasattr(inner, "base_layer") else inner.token_adapter.base_layer
    if isinstance(inner, nn.Embedding):
        return module(torch.arange(inner.num_embeddings))
    identity = torch.eye(inner.in_features)
    return (module(identity) - module(torch.zeros_like(identity))).T


def write(path, model, right):
    """The adapter, and the right values of some modules, by the names that they have in the base."""
    model.eval().save_pretrained(path / "adapter")
    with torch.no_grad():
        tensors = {name: value.detach().clone().contiguous() for name, value in right().items()}
    save_file(tensors, path / "right.safetensors")
    for name in ("adapter/README.md", "base/generation_config.json"):
        (path / name).unlink(missing_ok=True)
    # What PEFT writes has the path of the base.
    config = json.loads((path / "adapter/adapter_config.json").read_text())
    (path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}, indent=2) + "\n")


def tied_tokens_head_lora(path):
    model = base(transformers.LlamaForCausalLM, TEXT | dict(tie_word_embeddings=True), path / "base")
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], trainable_token_indices=[3, 8]))
    randomize(model)
    inner = model.base_model.model
    write(path, model, lambda: {"lm_head.weight": weight(inner.lm_head),
                                "model.embed_tokens.weight": weight(inner.model.embed_tokens)})


def tied_resized_head_lora(path):
    model = base(transformers.LlamaForCausalLM, TEXT | dict(tie_word_embeddings=True), path / "base")
    model.resize_token_embeddings(26, mean_resizing=False)
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    randomize(model)
    inner = model.base_model.model
    write(path, model, lambda: {"lm_head.weight": weight(inner.lm_head),
                                "model.embed_tokens.weight": weight(inner.model.embed_tokens)})


def classifier_of_two_layers(path):
    masked = base(transformers.RobertaForMaskedLM, TEXT, path / "base")
    masked.config.num_labels = 3
    torch.manual_seed(9)
    model = transformers.RobertaForSequenceClassification(masked.config)
    model.load_state_dict(masked.state_dict(), strict=False)
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    randomize(model)
    head = model.base_model.model.classifier.modules_to_save.default
    query = "roberta.encoder.layer.0.attention.self.query"
    write(path, model, lambda: {f"classifier.{name}": value for name, value in head.state_dict().items()}
          | {f"{query}.weight": weight(model.base_model.model.get_submodule(query))})


def resized_wte(path):
    model = base(transformers.GPT2LMHeadModel, GPT2, path / "base")
    model.resize_token_embeddings(27, mean_resizing=False)
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    randomize(model)
    inner = model.base_model.model
    write(path, model, lambda: {"transformer.wte.weight": inner.transformer.wte.weight})


def saved_by_ending(path):
    model = base(transformers.LlamaForCausalLM, TEXT, path / "base")
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    randomize(model)
    norms = {name.removeprefix("base_model.model."): module.modules_to_save.default.weight
             for name, module in model.named_modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)}
    write(path, model, lambda: {f"{name}.weight": value for name, value in norms.items()})


def head_4bit_lora(path):
    # Rows of whole blocks: the forward of Linear4bit takes wrong scales for others where it uses AVX-512.
    model = base(transformers.LlamaForCausalLM, TEXT | dict(hidden_size=64, intermediate_size=64), path / "base",
                 dict(llm_int8_skip_modules=["none"], bnb_4bit_use_double_quant=True))
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    randomize(model)
    inner = model.base_model.model
    for module in inner.modules():
        module.support_avx512bf16_for_cpu = False
    query = "model.layers.0.self_attn.q_proj"
    write(path, model, lambda: {f"{name}.weight": weight(inner.get_submodule(name)) for name in ("lm_head", query)})


def head_twice(path):
    """As older GPT-2 files have it: the head's weight besides, and nothing in the configuration."""
    model = base(transformers.GPT2LMHeadModel, GPT2, path / "base")
    config = json.loads((path / "base/config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (path / "base/config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, path / "base/model.safetensors", metadata={"format": "pt"})
    model = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["wte"], fan_in_fan_out=True))
    randomize(model)
    inner = model.base_model.model
    write(path, model, lambda: {"transformer.wte.weight": inner.transformer.wte.modules_to_save.default.weight,
                                "lm_head.weight": inner.lm_head.weight})


def main():
    cases = (tied_tokens_head_lora, tied_resized_head_lora, classifier_of_two_layers, resized_wte, saved_by_ending,
             head_4bit_lora, head_twice)
    for case in cases:
        if len(sys.argv) > 2 and case.__name__ not in sys.argv[2:]:
            continue
        path = Path(sys.argv[1]) / case.__name__
        shutil.rmtree(path, ignore_errors=True)
        case(path)
        print(path, sorted(file.name for file in path.rglob("*.*")))


if __name__ == "__main__":
    main()
