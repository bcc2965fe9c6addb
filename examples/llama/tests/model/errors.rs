//! What is not understood is an error that names it.

use crate::tiny::{ALL, LLAMA};
use nf4_llama::{Cache, CacheType, Config, Error, Logits, Options, Part, Workspace};
use serde_json::{Value, json};

fn parse(change: impl FnOnce(&mut Value)) -> Result<Config, Error> {
    let mut value: Value = serde_json::from_slice(LLAMA.config).unwrap();
    change(&mut value);
    Config::parse(value.to_string().as_bytes())
}

#[test]
fn configurations_of_all_families_are_understood() {
    for tiny in ALL {
        let config = Config::parse(tiny.config).unwrap();
        assert_eq!((config.family.model_type(), config.hidden, config.layers), (tiny.name, 64, 2));
        assert_eq!(config.qk_norm, tiny.name == "qwen3");
        assert_eq!(config.qkv_bias, tiny.name == "qwen2");
    }
}

#[test]
fn fields_that_matter_are_errors() {
    let cases = [
        ("model_type", json!("gemma2")),
        ("hidden_act", json!("gelu")),
        ("hidden_size", json!(0)),
        ("hidden_size", json!("64")),
        ("head_dim", json!(15)),
        ("num_key_value_heads", json!(3)),
        ("num_hidden_layers", Value::Null),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0 })),
        ("rope_parameters", json!({ "rope_type": "longrope" })),
        ("rope_parameters", json!({ "rope_type": "llama3", "factor": 8.0 })),
        ("rope_parameters", json!({ "rope_type": "default", "attention_factor": 1.2 })),
        ("rope_parameters", json!({ "rope_theta": -1.0 })),
        ("rope_interleaved", json!(true)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("logits_scaling", json!(8.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("num_local_experts", json!(8)),
        ("no_rope_layers", json!([1, 0])),
        ("eos_token_id", json!("</s>")),
        ("quantization_config", json!({ "quant_method": "gptq", "bits": 4 })),
    ];
    for (field, value) in cases {
        let nested = field.starts_with("rope_") && value.is_object();
        let error = parse(|config| {
            if field == "rope_scaling" {
                config.as_object_mut().unwrap().remove("rope_parameters");
            }
            config[field] = value.clone();
        });
        let message = error.expect_err(field).to_string();
        assert!(message.contains(if nested { "rope_" } else { field }), "{field} = {value}: {message}");
    }
    assert!(matches!(Config::parse(b"[]"), Err(Error::Checkpoint(_))));
    assert!(matches!(Config::parse(b"{"), Err(Error::Checkpoint(_))));
}

#[test]
fn fields_that_do_not_matter_are_not() {
    for (field, value) in [
        ("_name_or_path", json!("x")),
        ("unsloth_version", json!("2026.1")),
        ("something_new", Value::Null),
        ("something_new", json!(false)),
        ("rope_scaling", Value::Null),
    ] {
        parse(|config| config[field] = value.clone()).unwrap_or_else(|error| panic!("{field}: {error}"));
    }
}

#[test]
fn windows_limit_the_cache() {
    let mut value: Value = serde_json::from_slice(ALL[1].config).unwrap();
    value["sliding_window"] = json!(64);
    let config = Config::parse(value.to_string().as_bytes()).unwrap();
    assert_eq!(config.positions, 64);
    assert!(Cache::new(&config, 64, CacheType::F32).is_ok());
    let error = Cache::new(&config, 65, CacheType::F32).unwrap_err();
    assert!(error.to_string().contains("sliding_window"), "{error}");
}

#[test]
fn requests_that_do_not_fit_are_errors() {
    let model = LLAMA.load(Options::default());
    let mut workspace = Workspace::new(&model, 8, 1).unwrap();
    let mut cache = Cache::new(model.config(), 64, CacheType::F32).unwrap();
    let mut forward = |tokens: &[u32], logits, cache: &mut Cache| {
        model.forward(&mut [Part { cache, tokens, adapter: None }], logits, &mut workspace).map(|_| ())
    };
    assert_eq!(forward(&[260], Logits::Last, &mut cache), Err(Error::Token { token: 260, vocabulary: 260 }));
    assert!(matches!(forward(&[1; 9], Logits::Last, &mut cache), Err(Error::Room { needed: 9, got: 8, .. })));
    assert!(matches!(forward(&[1; 2], Logits::All, &mut cache), Err(Error::Room { needed: 2, got: 1, .. })));
    for _ in 0..8 {
        forward(&[1; 8], Logits::Last, &mut cache).unwrap();
    }
    assert!(matches!(forward(&[1], Logits::Last, &mut cache), Err(Error::Room { needed: 65, got: 64, .. })));
    assert_eq!(cache.len(), 64);
    let other = ALL[1].load(Options::default());
    let mut foreign = Cache::new(other.config(), 64, CacheType::F32).unwrap();
    assert_eq!(forward(&[1], Logits::Last, &mut foreign), Err(Error::ForeignCache));
    assert!(matches!(model.adapter("three"), Err(Error::Adapter { duplicate: false, .. })));
}
