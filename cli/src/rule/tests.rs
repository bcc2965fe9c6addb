use super::*;

/// Tensors of a file, each of a type and shape.
fn rule(config: &str, tensors: &[(&str, Dtype, &[usize])], wishes: Wishes<'_>) -> Result<Rule> {
    let config = serde_json::from_str::<Map<String, Value>>(config).unwrap();
    let infos: Vec<(&str, TensorInfo)> = tensors
        .iter()
        .map(|&(name, dtype, shape)| (name, TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (0, 0) }))
        .collect();
    let infos: Vec<_> = infos.iter().map(|(name, info)| (*name, info)).collect();
    Rule::new(Some(&config), &infos, wishes)
}

/// Tensors in bf16: matrices, but for norms.
fn matrices<'a>(names: &[&'a str]) -> Vec<(&'a str, Dtype, &'static [usize])> {
    let shape = |name: &str| if name.contains("norm") { &[4][..] } else { &[8, 4][..] };
    names.iter().map(|&name| (name, Dtype::BF16, shape(name))).collect()
}

const AS_IS: Wishes<'_> = Wishes { skip: &[], head: false };

fn quantized(rule: &Rule) -> Vec<&str> {
    let mut names: Vec<&str> = rule.quantized.keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#;
const LLAMA_TENSORS: [&str; 6] = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
];

#[test]
fn default_choice() {
    let rule = rule(LLAMA, &matrices(&LLAMA_TENSORS), AS_IS).unwrap();
    assert_eq!(quantized(&rule), [LLAMA_TENSORS[1], LLAMA_TENSORS[2], LLAMA_TENSORS[3]]);
    assert_eq!(rule.skip_modules, None);
    assert_eq!(rule.warnings, [""; 0]);
}

#[test]
fn wishes() {
    let skip = ["model.layers.1".to_owned(), "q_proj".to_owned(), "gate".to_owned()];
    let chosen = rule(LLAMA, &matrices(&LLAMA_TENSORS), Wishes { skip: &skip, head: false }).unwrap();
    assert_eq!(quantized(&chosen), [LLAMA_TENSORS[3]]);
    assert_eq!(chosen.skip_modules.unwrap(), ["lm_head", "model.layers.1", "q_proj", "gate"]);
    assert_eq!(chosen.warnings.len(), 1, "{:?}", chosen.warnings);
    assert!(chosen.warnings[0].contains("--skip gate"));

    let with_head = Wishes { skip: &skip[1..2], head: true };
    let chosen = rule(LLAMA, &matrices(&LLAMA_TENSORS), with_head).unwrap();
    assert_eq!(quantized(&chosen), [LLAMA_TENSORS[5], LLAMA_TENSORS[2], LLAMA_TENSORS[3]]);
    assert_eq!(chosen.skip_modules.unwrap(), ["q_proj"]);
    let error = rule(LLAMA, &matrices(&LLAMA_TENSORS[..5]), with_head).unwrap_err().to_string();
    assert!(error.contains("there is none") && error.contains("lm_head"), "{error}");
    let tied = LLAMA.replace('}', r#", "tie_word_embeddings": true}"#);
    let error = rule(&tied, &matrices(&LLAMA_TENSORS), with_head).unwrap_err().to_string();
    assert!(error.contains("tied"), "{error}");
    let bad = Wishes { skip: &["*".to_owned()], head: false };
    assert!(rule(LLAMA, &matrices(&LLAMA_TENSORS), bad).is_err());
}

/// What cannot be quantized is listed, so that transformers makes no 4-bit layer of it: many layers in one entry, unless
/// that would mean others too.
#[test]
fn weights_that_stay() {
    let mut tensors = matrices(&LLAMA_TENSORS);
    tensors[1].1 = Dtype::F64;
    let chosen = rule(LLAMA, &tensors, AS_IS).unwrap();
    assert_eq!(quantized(&chosen), LLAMA_TENSORS[2..4]);
    assert_eq!(chosen.skip_modules.unwrap(), ["lm_head", "model.layers.0.self_attn.q_proj"]);
    assert!(chosen.warnings[0].contains("1 weights stay") && chosen.warnings[0].contains("layers.*.self_attn.q_proj"));
    tensors[1].1 = Dtype::BF16;
    for tensor in &mut tensors[2..4] {
        tensor.2 = &[0, 4];
    }
    let chosen = rule(LLAMA, &tensors, AS_IS).unwrap();
    assert_eq!(chosen.skip_modules.unwrap(), ["lm_head", r"model.layers.\d+.mlp.up_proj"]);
    tensors[3].2 = &[8, 4];
    let chosen = rule(LLAMA, &tensors, AS_IS).unwrap();
    assert_eq!(quantized(&chosen), [LLAMA_TENSORS[1], LLAMA_TENSORS[3]]);
    assert_eq!(chosen.skip_modules.unwrap(), ["lm_head", "model.layers.1.mlp.up_proj"]);
    let chosen =
        rule(LLAMA, &matrices(&["model.layers.0.self_attn.q_proj.weight", "model.extra.weight"]), AS_IS).unwrap();
    assert_eq!(chosen.skip_modules.unwrap(), ["lm_head", "model.extra"]);
    assert!(chosen.warnings[0].contains("LlamaForCausalLM"), "{:?}", chosen.warnings);
}

/// The last name decides nothing: what is an `nn.Linear` is quantized, whatever it is called, and a subclass is not.
#[test]
fn classes_not_names() {
    for (class, names, expected) in [
        ("ElectraForMaskedLM", &["electra.embeddings_project.weight"][..], &["electra.embeddings_project.weight"][..]),
        (
            "AlbertForMaskedLM",
            &["albert.encoder.embedding_hidden_mapping_in.weight", "albert.embeddings.word_embeddings.weight"],
            &["albert.encoder.embedding_hidden_mapping_in.weight"],
        ),
        (
            "FalconForCausalLM",
            &["transformer.h.0.mlp.dense_h_to_4h.weight", "transformer.h.0.self_attention.dense.weight"],
            &[],
        ),
        ("GPT2LMHeadModel", &["h.0.attn.c_attn.weight", "wte.weight", "wpe.weight"], &["h.0.attn.c_attn.weight"]),
        (
            "T5ForConditionalGeneration",
            &[
                "shared.weight",
                "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
                "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            ],
            &["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"],
        ),
        (
            "Gemma3ForConditionalGeneration",
            &[
                "language_model.model.embed_tokens.weight",
                "language_model.model.layers.0.mlp.up_proj.weight",
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            ],
            &[
                "language_model.model.layers.0.mlp.up_proj.weight",
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            ],
        ),
    ] {
        let config = format!(r#"{{"architectures": ["{class}"]}}"#);
        let chosen = rule(&config, &matrices(names), AS_IS).unwrap();
        if expected.is_empty() {
            assert!(quantized(&chosen).is_empty(), "{class}: {chosen:?}");
        } else {
            assert_eq!(quantized(&chosen), expected, "{class}");
        }
        assert_eq!((chosen.skip_modules, chosen.warnings), (None, vec![]), "{class}");
        let is_conv = class == "GPT2LMHeadModel";
        let layout = if is_conv { Layout::Transposed } else { Layout::Linear };
        assert!(chosen.quantized.values().all(|l| *l == layout), "{class}");
    }
}

#[test]
fn experts() {
    let names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ];
    for config in [r#"{"architectures": ["MixtralForCausalLM"]}"#, r#"{"model_type": "mixtral"}"#] {
        let chosen = rule(config, &matrices(&names), AS_IS).unwrap();
        assert_eq!(quantized(&chosen), names[..1]);
        assert_eq!(chosen.skip_modules, None);
        assert_eq!(chosen.warnings.len(), 1);
        assert!(chosen.warnings[0].contains("2 weights stay") && chosen.warnings[0].contains("experts.*.w1"));
    }
    // Fused, as gpt-oss has them on the hub.
    let tensors = [("model.layers.0.mlp.experts.gate_up_proj", Dtype::BF16, &[2, 8, 4][..])];
    let chosen = rule(r#"{"architectures": ["GptOssForCausalLM"]}"#, &tensors, AS_IS).unwrap();
    assert!(quantized(&chosen).is_empty() && chosen.warnings[0].contains("experts"), "{chosen:?}");
}

/// An architecture that the table does not have: guessed, said, and listed.
#[test]
fn unknown_architectures() {
    let names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "score.weight",
    ];
    for (config, message) in [
        (r#"{"architectures": ["FrobnicateForCausalLM"], "model_type": "llama"}"#, "FrobnicateForCausalLM"),
        (r#"{"model_type": "frobnicate"}"#, "model_type frobnicate"),
        ("{}", "config.json names no architecture"),
    ] {
        let chosen = rule(config, &matrices(&names), AS_IS).unwrap();
        assert_eq!(quantized(&chosen), [names[1]]);
        let list = chosen.skip_modules.unwrap();
        for entry in [
            "lm_head",
            "proj_out",
            "model.embed_tokens",
            r"model.layers.\d+.mlp.experts.\d+.up_proj",
            "model.layers.0.mlp.gate",
        ] {
            assert!(list.iter().any(|e| e == entry), "{entry} is not in {list:?}");
        }
        assert_eq!(chosen.warnings.len(), 1);
        assert!(chosen.warnings[0].contains(message), "{:?}", chosen.warnings);
    }
}
