//! Names of tensors: other ones, tied ones, and those of what cannot be merged.

use nf4::checkpoint::{CheckpointError, Dtype, MergeOptions, MergedModel, Note, TensorData, TensorMap, TensorSource};
use serde_json::{Value, json};

use super::{EMBEDDING, HEAD, adapter, config_of, equal, llama, merge, model, read, values};

/// Names of other classes, savers and wrappers.
#[test]
fn names() {
    let pair = |module: &str| {
        let tensors = [(format!("{module}.lora_A.weight"), [1, 4]), (format!("{module}.lora_B.weight"), [4, 1])];
        let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
        adapter(&json!({"r": 1}), &tensors).unwrap()
    };
    let maps = |module: &str, tensor: &str, other: &[(&str, &[usize])]| {
        let base = model(&[other, &[(tensor, &[4, 4])]].concat());
        let pair = pair(module);
        let merged =
            MergedModel::new(&base, Some(&pair), &MergeOptions::new()).unwrap_or_else(|e| panic!("{module}: {e}"));
        assert_eq!(merged.merged(), [tensor.strip_suffix(".weight").unwrap()], "{module}");
    };
    let other: &[(&str, &[usize])] = &[("vision_tower.layers.0.q.weight", &[4, 4])];
    maps("model.layers.0.q", "model.layers.0.q.weight", other);
    maps("layers.0.q", "model.layers.0.q.weight", &[]);
    maps("model.layers.0.q", "layers.0.q.weight", &[]);
    maps("model.language_model.layers.0.q", "language_model.model.layers.0.q.weight", other);
    maps("transformer.h.0.attn.c_attn", "h.0.attn.c_attn.weight", &[]);
    maps("h.0.attn.c_attn", "transformer.h.0.attn.c_attn.weight", &[]);
    maps("_orig_mod.model.layers.0._orig_mod.q", "model.layers.0.q.weight", &[]);
    maps("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.q", "model.layers.0.q.weight", &[]);
    maps("model.layers.0._checkpoint_wrapped_module.q", "model.layers.0.q.weight", &[]);
    maps("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate.weight", &[]);
    // With the name of the adapter, as in memory.
    let raw =
        adapter(&json!({"r": 1}), &[("m.q.lora_A.default.weight", &[1, 4]), ("m.q.lora_B.default.weight", &[4, 1])]);
    assert_eq!(raw.unwrap().modules().map(|(name, _)| name).collect::<Vec<_>>(), ["m.q"]);

    let refused = |module: &str, tensors: &[&str], parts: &[&str]| {
        let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|name| (*name, &[4, 4][..])).collect();
        let (base, pair) = (model(&tensors), pair(module));
        let error = MergedModel::new(&base, Some(&pair), &MergeOptions::new()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error} has not {parts:?}");
    };
    // Another layer, and not the only one there is.
    refused("model.layers.9.q", &["model.layers.0.q.weight"], &["model.layers.9.q", "model.layers.0.q"]);
    refused("layers.9.q", &["model.layers.0.q.weight"], &["layers.9.q", "model.layers.0.q"]);
    refused("layers.0.q", &["a.layers.0.q.weight", "b.layers.0.q.weight"], &["a.layers.0.q", "b.layers.0.q", "either"]);
    refused("model.layers.0.quality", &["model.layers.0.q.weight"], &["quality", "the nearest name"]);
}

/// Names, and one weight of a pair that the adapter has, under ties of each kind.
#[test]
fn ties() {
    let base = model(&[(EMBEDDING, &[6, 4])]);
    let whole = |tensors: &[(&str, &[usize])], more: Value| {
        let mut config = json!({"modules_to_save": ["embed_tokens"]});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        adapter(&config, tensors).unwrap()
    };
    let tied = |merged: &MergedModel<'_>| config_of(merged)["tie_word_embeddings"].as_bool();
    // Saved because the vocabulary grew, not trained alone: it stays one.
    let resized = whole(&[(EMBEDDING, &[8, 4])], json!({"modules_to_save": null}));
    let merged = merge(&base, &resized, &llama(true)).unwrap();
    assert_eq!((read(&merged, EMBEDDING), tied(&merged)), (values(32, 50), Some(true)));
    assert!(merged.info(HEAD).is_none());
    assert_eq!(config_of(&merged)["vocab_size"], 8);
    // Trained, with the tie kept.
    let kept = whole(&[(EMBEDDING, &[6, 4])], json!({"ensure_weight_tying": true}));
    let merged = merge(&base, &kept, &llama(true)).unwrap();
    assert_eq!((read(&merged, EMBEDDING), tied(&merged)), (values(24, 50), Some(true)));
    assert!(merged.info(HEAD).is_none());
    // Both trained.
    let both = whole(&[(EMBEDDING, &[6, 4]), (HEAD, &[6, 4])], json!({"modules_to_save": ["embed_tokens", "lm_head"]}));
    let merged = merge(&base, &both, &llama(true)).unwrap();
    assert_eq!((read(&merged, EMBEDDING), read(&merged, HEAD)), (values(24, 50), values(24, 51)));
    assert_eq!(tied(&merged), Some(false));
    // Trained alone and resized: what the head had is not there with as many rows.
    let alone = whole(&[(EMBEDDING, &[8, 4])], json!({}));
    let error = merge(&base, &alone, &llama(true)).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains('8') && error.contains('6'), "{error}");
    // Not tied, and one of two resized.
    let untied = model(&[(EMBEDDING, &[6, 4]), (HEAD, &[6, 4])]);
    let error = merge(&untied, &alone, &llama(false)).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains(HEAD), "{error}");
    // A model without a head has no tie.
    let config =
        json!({"model_type": "llama", "architectures": ["LlamaModel"], "tie_word_embeddings": true, "vocab_size": 6});
    let trained = whole(&[(EMBEDDING, &[6, 4])], json!({}));
    let merged = merge(&base, &trained, &config).unwrap();
    assert_eq!((merged.names().collect::<Vec<_>>(), tied(&merged)), (vec![EMBEDDING], Some(true)));
    // Nothing says that it is tied, but there is no head: Gemma's default.
    let config = json!({"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 6});
    let merged = merge(&base, &trained, &config).unwrap();
    assert_eq!((read(&merged, HEAD), tied(&merged)), (values(24, 0), Some(false)));
    // The head and its bias have other names in BERT, and encoder and decoder of BART share the embedding too.
    let base = model(&[("bert.embeddings.word_embeddings.weight", &[6, 4]), ("cls.predictions.bias", &[6])]);
    let config = json!({
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": true, "vocab_size": 6
    });
    let trained =
        whole(&[("bert.embeddings.word_embeddings.weight", &[6, 4])], json!({"modules_to_save": ["word_embeddings"]}));
    let merged = merge(&base, &trained, &config).unwrap();
    assert_eq!(read(&merged, "cls.predictions.decoder.weight"), values(24, 0));
    assert_eq!(read(&merged, "cls.predictions.decoder.bias"), values(6, 1));
    let base = model(&[("model.shared.weight", &[6, 4])]);
    let config = json!({"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 6});
    let pair: [(&str, &[usize]); 2] = [("lm_head.lora_A.weight", &[1, 4]), ("lm_head.lora_B.weight", &[6, 1])];
    let head = adapter(&json!({"r": 1, "lora_alpha": 1}), &pair).unwrap();
    let merged = merge(&base, &head, &config).unwrap();
    let names = [HEAD, "model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight", "model.shared.weight"];
    assert_eq!(merged.names().collect::<Vec<_>>(), names);
    for name in &names[1..] {
        assert_eq!(read(&merged, name), values(24, 0), "{name}");
    }
    let (a, b, weight) = (values(4, 50), values(6, 51), values(24, 0));
    equal(&read(&merged, HEAD), (0..24).map(|n| f64::from(weight[n]) + f64::from(a[n % 4]) * f64::from(b[n / 4])));
    assert!(merged.notes().iter().any(|note| matches!(note, Note::Untied { .. })));
}

/// Whatever is packed in another format is named, by its names or by its types.
#[test]
fn other_formats() {
    let tensor = |name: &str, dtype: Dtype, shape: &[usize]| {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        (name.to_owned(), TensorData::new(name, dtype, shape.to_vec(), bytes).unwrap())
    };
    let (f32, f16, u8, i8, i32, f8) = (Dtype::F32, Dtype::F16, Dtype::U8, Dtype::I8, Dtype::I32, Dtype::F8_E4M3);
    for (format, tensors) in [
        ("int8", vec![("m.q.weight", i8, &[4, 4][..]), ("m.q.SCB", f32, &[4])]),
        ("FP8", vec![("m.q.weight", f8, &[4, 4]), ("m.q.weight_scale_inv", f32, &[1, 1])]),
        ("FP8", vec![("m.q.weight", f8, &[4, 4])]),
        ("GPTQ", vec![("m.q.qweight", i32, &[1, 4]), ("m.q.qzeros", i32, &[1, 1]), ("m.q.scales", f16, &[1, 4])]),
        ("GPTQ", vec![("m.q.g_idx", i32, &[4])]),
        ("MXFP4", vec![("m.q_blocks", u8, &[2, 4, 1, 16]), ("m.q_scales", u8, &[2, 4, 1])]),
        ("compressed-tensors", vec![("m.q.weight_packed", i32, &[4, 1]), ("m.q.weight_shape", Dtype::I64, &[2])]),
        ("compressed-tensors", vec![("m.q.weight", i8, &[4, 4]), ("m.q.weight_scale", f32, &[4, 1])]),
        ("HQQ", vec![("m.q.W_q", u8, &[4, 4]), ("m.q.scale", f16, &[4]), ("m.q.zero", f16, &[4])]),
        ("AQLM", vec![("m.q.codes", i8, &[4, 1, 1]), ("m.q.codebooks", f16, &[1, 2, 1, 2]), ("m.q.scales", f16, &[4])]),
        ("EETQ", vec![("m.q.weight", i8, &[4, 4]), ("m.q.weight_scales", f16, &[4])]),
        ("quanto", vec![("m.q.weight._data", i8, &[4, 4]), ("m.q.weight._scale", f32, &[4, 1])]),
        ("torchao", vec![("m.q.weight_qdata", i8, &[4, 4])]),
        ("VPTQ", vec![("m.q.centroids", f16, &[1, 4]), ("m.q.indices", i32, &[1, 4])]),
        ("U8 data without a description", vec![("m.q.weight", u8, &[8, 1])]),
        ("I8 data without a description", vec![("m.experts.gate_up_proj", i8, &[8, 2])]),
        ("I32 data without a description", vec![("m.q.weight", i32, &[8, 1])]),
    ] {
        let base: TensorMap<'_> = tensors.iter().map(|(name, dtype, shape)| tensor(name, *dtype, shape)).collect();
        let found = nf4::checkpoint::foreign_tensors(&base);
        assert_eq!(found.len(), tensors.len(), "{format}: {found:?}");
        let error = MergedModel::new(&base, None, &MergeOptions::new()).unwrap_err();
        assert!(matches!(error, CheckpointError::Foreign { .. }), "{format}: {error}");
        assert!(found.iter().any(|tensor| tensor.format.contains(format)), "{format}: {found:?}");
        assert!(error.to_string().starts_with("m.q") || error.to_string().starts_with("m.experts"), "{error}");
    }
    // What a plain model has too.
    let plain = [
        tensor("h.0.attn.bias", u8, &[1, 1, 4, 4]),
        tensor("h.0.attn.masked_bias", f32, &[]),
        tensor("embeddings.position_ids", Dtype::I64, &[1, 4]),
        tensor("attn.relative_position_index", i32, &[4, 4]),
        tensor("norm.num_batches_tracked", Dtype::I64, &[]),
        tensor("logit_scale", f32, &[]),
        tensor("attn.mask", Dtype::BOOL, &[2, 2]),
    ];
    let plain = TensorMap::from(plain);
    assert_eq!(nf4::checkpoint::foreign_tensors(&plain), []);
    assert_eq!(MergedModel::new(&plain, None, &MergeOptions::new()).unwrap().names().count(), 7);
    // Packed bytes that say they are floats.
    let config =
        json!({"quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_storage": "bfloat16"}}).to_string();
    let base = TensorMap::from([tensor("m.q.weight", Dtype::BF16, &[8, 1])]);
    let options = MergeOptions::new().with_config(config.as_bytes());
    let error = MergedModel::new(&base, None, &options).unwrap_err().to_string();
    assert!(error.contains("m.q.weight") && error.contains("without a description"), "{error}");
    // Parts without the packed tensor.
    for name in ["m.q.weight.absmax", "m.experts.gate_up_proj.quant_map", "x.nested_absmax"] {
        let base = TensorMap::from([tensor(name, f32, &[16])]);
        let error = MergedModel::new(&base, None, &MergeOptions::new()).unwrap_err().to_string();
        assert!(error.starts_with(name.rsplit_once('.').unwrap().0), "{error}");
    }
    // A configuration that names another format.
    for (section, format) in [
        (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        (json!({"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}), "fp8"),
        (json!({"bits": 4}), "without quant_method"),
    ] {
        for field in ["quantization_config", "compression_config"] {
            let config = json!({field: section}).to_string();
            let options = MergeOptions::new().with_config(config.as_bytes());
            let error = MergedModel::new(&plain, None, &options).unwrap_err().to_string();
            assert!(error.contains(format), "{error}");
        }
    }
}

/// What a save of unfinished shards leaves.
#[test]
fn empty_tensors() {
    let empty: [(&str, &[usize]); 2] = [("m.q.lora_A.weight", &[0]), ("m.q.lora_B.weight", &[0])];
    let error = adapter(&json!({"r": 1}), &empty).unwrap_err().to_string();
    assert!(error.contains("m.q.lora_A.weight") && error.contains("[0]") && error.contains("ZeRO-3"), "{error}");
    let base = model(&[("m.q.weight", &[0])]);
    let error = MergedModel::new(&base, None, &MergeOptions::new()).unwrap_err().to_string();
    assert!(error.contains("m.q.weight") && error.contains("ZeRO-3"), "{error}");
}
