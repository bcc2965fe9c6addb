"""Tiny models with random weights, one of each architecture that people quantize, and adapters for them.

For each, what `nf4 quantize`, `dequantize` and `merge` write is loaded by transformers, and compared with what
transformers and PEFT make themselves of the same weights.
"""
import copy

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

# Rows are whole blocks, so that the forward of Linear4bit is right on every CPU.
TEXT = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = TEXT | dict(num_key_value_heads=2, head_dim=32)
MOE = GROUPED | dict(num_experts_per_tok=2, moe_intermediate_size=64)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
IMAGE = 90

# Name, class, what its configuration gets.
FAMILIES = [
    ("llama", "LlamaForCausalLM", GROUPED),
    ("llama, tied", "LlamaForCausalLM", GROUPED | dict(tie_word_embeddings=True)),
    ("mistral", "MistralForCausalLM", GROUPED),
    ("qwen2", "Qwen2ForCausalLM", GROUPED | dict(tie_word_embeddings=True)),
    ("qwen3_moe", "Qwen3MoeForCausalLM", MOE | dict(num_experts=4)),
    ("mixtral", "MixtralForCausalLM", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)),
    ("gemma3, text", "Gemma3ForCausalLM", GROUPED | dict(query_pre_attn_scalar=32)),
    ("gemma3, vision", "Gemma3ForConditionalGeneration",
     dict(text_config=GROUPED | dict(query_pre_attn_scalar=32), vision_config=VISION, mm_tokens_per_image=4,
          image_token_index=IMAGE, boi_token_index=91, eoi_token_index=92)),
    ("phi3", "Phi3ForCausalLM", TEXT | dict(num_key_value_heads=2)),
    ("gpt2", "GPT2LMHeadModel", dict(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1,
                                     eos_token_id=2)),
    ("falcon", "FalconForCausalLM", dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         bos_token_id=1, eos_token_id=2)),
    ("bloom", "BloomForCausalLM", dict(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)),
    ("opt", "OPTForCausalLM", dict(vocab_size=96, hidden_size=64, word_embed_proj_dim=128, ffn_dim=128,
                                   num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)),
    ("bert", "BertForMaskedLM", TEXT),
    ("whisper", "WhisperForConditionalGeneration",
     dict(vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
          decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=8,
          max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
          suppress_tokens=None, begin_suppress_tokens=None)),
    ("t5", "T5ForConditionalGeneration",
     dict(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    ("t5, gated", "T5ForConditionalGeneration",
     dict(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
          feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    ("mamba2", "Mamba2ForCausalLM",
     dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=16, n_groups=1, num_heads=8, head_dim=16,
          chunk_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
]


def make(cls, settings, path):
    """A dense model in f32."""
    torch.manual_seed(len(cls.__name__))
    model = cls(cls.config_class(**copy.deepcopy(settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * scale)
    model.tie_weights()
    model.save_pretrained(path)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def logits(model):
    ids = torch.arange(12).reshape(2, 6) * 5 % 80 + 3
    inputs = dict(input_ids=ids)
    if model.config.model_type == "whisper":
        features = torch.sin(torch.arange(2 * 16 * 16).reshape(2, 16, 16) * 0.37)
        inputs = dict(input_features=features, decoder_input_ids=ids)
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    elif model.config.model_type == "gemma3":
        ids[:, 1:5] = IMAGE
        pixels = torch.sin(torch.arange(2 * 3 * 28 * 28).reshape(2, 3, 28, 28) * 0.11)
        inputs |= dict(pixel_values=pixels, token_type_ids=(ids == IMAGE).long())
    with torch.no_grad():
        return model(**inputs).logits


# --- quantize and dequantize

def quantized(case):
    """Compares what the tool makes with what transformers makes."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    reference = case.load("given", quantization_config=config)
    theirs = linears(reference)
    case.layers = len(theirs)
    if not theirs:
        # transformers has nothing to quantize here, of which the tool makes an error; a base for adapters is it still.
        case.base = "given"
        try:
            case.tool("quantize", case.work / "given", "--out", case.work / "ours")
        except RuntimeError as error:
            return None if "nothing to quantize" in str(error) else str(error)
        return "transformers makes no 4-bit layer"
    case.tool("quantize", case.work / "given", "--out", case.work / "ours")
    model = case.load("ours")
    ours = linears(model)
    if ours.keys() != theirs.keys():
        return f"4-bit in one alone: {sorted(ours.keys() ^ theirs.keys())}"
    for name, module in ours.items():
        a, b = module.weight, theirs[name].weight
        if not case.same_bits(a.data, b.data) or not case.same_bits(a.quant_state.absmax, b.quant_state.absmax):
            return f"the bytes of {name}"
    return None if case.same_bits(logits(model), logits(reference)) else "logits"


def dequantized(case):
    """Compares the dense model with the values of the 4-bit model that it was made of."""
    if not case.layers:
        (case.work / "dense").symlink_to(case.work / "given")
        return None
    case.tool("dequantize", case.work / "ours", "--out", case.work / "dense", "--dtype", "f32")
    four, dense = case.load("ours"), case.load("dense")
    if linears(dense):
        return f"still 4-bit: {sorted(linears(dense))}"
    expected = {name: value for name, value in four.state_dict().items() if ".weight." not in name}
    for name, module in linears(four).items():
        weight = case.restore(module.weight.data, module.weight.quant_state)
        is_conv = isinstance(dense.get_submodule(name), Conv1D)
        expected[f"{name}.weight"] = weight.T if is_conv else weight
    values = dense.state_dict()
    if expected.keys() != values.keys():
        return f"tensors {sorted(expected.keys() ^ values.keys())}"
    wrong = [name for name in expected if not case.same_bits(expected[name], values[name])]
    return f"values of {wrong}" if wrong else None


# --- merge

def head(model):
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), None)


def targets(model, which):
    """Modules to adapt: the head, or all others that PEFT adapts."""
    if which == "head":
        return [head(model)]
    # PEFT refuses Mamba's, whose kernels do not call the module.
    refused = ("out_proj",) if model.config.model_type == "mamba2" else ()
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
            and name != head(model) and not name.endswith(refused)]


def merged(case, which):
    """Compares the merged model with PEFT's."""
    model = case.load("dense")
    output = model.get_output_embeddings()
    if which == "head" and output.weight is model.get_input_embeddings().weight:
        # PEFT would change the embedding too, which the adapter does not adapt.
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    names = targets(model, which)
    is_conv = isinstance(model.get_submodule(names[0]), Conv1D)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=is_conv)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    adapter, ours = f"adapter_{which}", f"ours_{which}"
    model.save_pretrained(case.work / adapter)
    case.tool("merge", case.work / case.base, "--adapter", case.work / adapter, "--out", case.work / ours, "--dtype", "f32")
    # PEFT's model in memory: saved and loaded again, a head of BERT that was untied has lost its bias.
    a, b = case.load(ours).state_dict(), model.merge_and_unload().state_dict()
    if a.keys() != b.keys():
        return f"tensors {sorted(a.keys() ^ b.keys())}"
    # PEFT adds in f32, nf4 rounds once.
    wrong = [name for name in a if a[name].shape != b[name].shape
             or (a[name] - b[name]).abs().max() > 1e-6 * b[name].abs().max()]
    return f"values of {wrong}" if wrong else None


class Case:
    """A family, and what its steps need."""

    def __init__(self, cls, settings, tool, restore, same_bits, work):
        self.cls, self.tool, self.restore, self.same_bits, self.work = cls, tool, restore, same_bits, work
        self.base, self.layers = "ours", 0
        make(cls, settings, work / "given")

    def load(self, name, **settings):
        model = self.cls.from_pretrained(self.work / name, device_map="cpu", dtype=torch.float32, **settings).eval()
        for module in linears(model).values():
            module.support_avx512bf16_for_cpu = False  # in f32 on every machine
        return model


def check(name, settings, tool, restore, same_bits, work):
    """What is wrong with a family, by step; and how many layers are quantized."""
    case = Case(getattr(transformers, name), settings, tool, restore, same_bits, work)
    steps = {"quantize": quantized, "dequantize": dequantized, "merge all": lambda case: merged(case, "all"),
             "merge head": lambda case: merged(case, "head")}
    wrong = {}
    for what, step in steps.items():
        try:
            result = step(case)
        except Exception as error:  # transformers does not load it, or the tool refuses
            result = f"{type(error).__name__}: {error}"
        if result:
            wrong[what] = result
    return wrong, f"{case.layers} layers"
