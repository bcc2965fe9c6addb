//! What is added to weights: by pairs for embeddings, convolutions, tokens and the parameters of experts.

use nf4::checkpoint::{FloatType, MergeOptions, MergedModel, PeftAdapter, TensorMap, TensorSource};
use serde_json::{Value, json};

use super::{EMBEDDING, HEAD, adapter, add, config_of, equal, llama, merge, model, product, read, values};

/// `lora_embedding_A` `[r, words]` and `lora_embedding_B` `[dim, r]`: `(B A)^T` is added; the head, which shares the weight in
/// the base, keeps that of the base.
#[test]
fn embeddings() {
    let base = model(&[(EMBEDDING, &[6, 4]), ("model.norm.weight", &[4])]);
    let pairs: &[(&str, &[usize])] =
        &[("model.embed_tokens.lora_embedding_A", &[2, 6]), ("model.embed_tokens.lora_embedding_B", &[4, 2])];
    let (a, b, weight) = (values(12, 50), values(8, 51), values(24, 0));
    let sum = |i: usize| {
        let (word, d) = (i / 4, i % 4);
        f64::from(weight[i]) + 2.0 * product(2, |k| b[d * 2 + k], |k| a[k * 6 + word])
    };
    let adapter_of = |more: Value, tensors: &[(&str, &[usize])]| {
        let mut config = json!({"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        adapter(&config, tensors).unwrap()
    };
    let plain = adapter_of(json!({}), pairs);
    let merged = merge(&base, &plain, &llama(true)).unwrap();
    equal(&read(&merged, EMBEDDING), (0..24).map(sum));
    assert_eq!(read(&merged, HEAD), weight);
    assert_eq!(config_of(&merged)["tie_word_embeddings"], false);
    // With ensure_weight_tying both sides follow.
    let tied = adapter_of(json!({"ensure_weight_tying": true}), pairs);
    let merged = merge(&base, &tied, &llama(true)).unwrap();
    equal(&read(&merged, EMBEDDING), (0..24).map(sum));
    assert!(merged.info(HEAD).is_none());
    assert_eq!(config_of(&merged)["tie_word_embeddings"], true);
    // DoRA: the columns have norms.
    let dora = adapter_of(
        json!({"use_dora": true}),
        &[pairs[0], pairs[1], ("model.embed_tokens.lora_magnitude_vector", &[4])],
    );
    let magnitude = values(4, 52);
    let norm = |d: usize| (0..6).map(|word| sum(word * 4 + d).powi(2)).sum::<f64>().sqrt();
    let merged = merge(&base, &dora, &llama(false)).unwrap();
    let got = read(&merged, EMBEDDING);
    for (i, got) in got.iter().enumerate() {
        let expected = f64::from(magnitude[i % 4]) * sum(i) / norm(i % 4);
        // The norm is rounded to f32, as the magnitude is.
        assert!((f64::from(*got) - expected).abs() <= expected.abs() * 1.3e-7, "{i}: {got}, not {expected}");
    }
}

/// `A` `[r, in, kh, kw]`, `B` `[out, r, 1, 1]`, and with `DoRA` a magnitude `[1, out, 1, 1]`.
#[test]
fn convolutions() {
    let base = model(&[("conv.weight", &[3, 2, 2, 2])]);
    let (weight, a, b) = (values(24, 0), values(16, 50), values(6, 51));
    let tensors: [(&str, &[usize]); 3] = [
        ("conv.lora_A.weight", &[2, 2, 2, 2]),
        ("conv.lora_B.weight", &[3, 2, 1, 1]),
        ("conv.lora_magnitude_vector", &[1, 3, 1, 1]),
    ];
    let sum = |i: usize| {
        let (out, rest) = (i / 8, i % 8);
        f64::from(weight[i]) + 3.0 * product(2, |k| b[out * 2 + k], |k| a[k * 8 + rest])
    };
    let plain = adapter(&json!({"r": 2, "lora_alpha": 6}), &tensors[..2]).unwrap();
    let merged = MergedModel::new(&base, Some(&plain), &MergeOptions::new()).unwrap();
    equal(&read(&merged, "conv.weight"), (0..24).map(sum));
    let dora = adapter(&json!({"r": 2, "lora_alpha": 6, "use_dora": true}), &tensors).unwrap();
    let magnitude = values(3, 52);
    let merged = MergedModel::new(&base, Some(&dora), &MergeOptions::new()).unwrap();
    for (i, got) in read(&merged, "conv.weight").iter().enumerate() {
        let norm = (0..8).map(|rest| sum(i / 8 * 8 + rest).powi(2)).sum::<f64>().sqrt();
        let expected = f64::from(magnitude[i / 8]) * sum(i) / norm;
        assert!((f64::from(*got) - expected).abs() <= expected.abs() * 1.3e-7, "{i}: {got}, not {expected}");
    }
    // Groups give B another shape than the base has; a kernel of another shape is another layer.
    let grouped = model(&[("conv.weight", &[3, 1, 2, 2])]);
    let error = MergedModel::new(&grouped, Some(&plain), &MergeOptions::new()).unwrap_err().to_string();
    assert!(error.contains("conv") && error.contains("[3, 4]") && error.contains("[3, 8]"), "{error}");
    let other = model(&[("conv.weight", &[3, 2, 4, 1])]);
    let error = MergedModel::new(&other, Some(&plain), &MergeOptions::new()).unwrap_err().to_string();
    assert!(error.contains("kernel of conv.weight"), "{error}");
    // It is written again with the shapes that it had.
    let (config, file) = dora.to_files(FloatType::F32).unwrap();
    let file = nf4::checkpoint::TensorFile::parse(&file).unwrap();
    assert_eq!(file.info("base_model.model.conv.lora_magnitude_vector").unwrap().shape, [1, 3, 1, 1]);
    assert_eq!(PeftAdapter::load(config.as_bytes(), &file).unwrap().to_files(FloatType::F32).unwrap().0, config);
}

/// Rows of tokens replace those of the embedding, and of a tied head, which stays tied.
#[test]
fn trained_tokens() {
    const DELTA: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";
    let base = model(&[(EMBEDDING, &[6, 4])]);
    let (weight, rows) = (values(24, 0), values(8, 50));
    let expected = |i: usize| match i / 4 {
        5 => rows[i % 4],
        1 => rows[4 + i % 4],
        _ => weight[i],
    };
    for indices in [json!([5, 1]), json!({"embed_tokens": [5, 1]})] {
        let tokens = adapter(&json!({"trainable_token_indices": indices}), &[(DELTA, &[2, 4])]).unwrap();
        let merged = merge(&base, &tokens, &llama(true)).unwrap();
        assert_eq!(read(&merged, EMBEDDING), (0..24).map(expected).collect::<Vec<_>>());
        assert!(merged.info(HEAD).is_none());
        assert_eq!(config_of(&merged)["tie_word_embeddings"], true);
    }
    // Other tokens of the head: no longer one.
    let both = adapter(
        &json!({"trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [0]}}),
        &[(DELTA, &[2, 4]), ("lm_head.token_adapter.trainable_tokens_delta", &[1, 4])],
    )
    .unwrap();
    let merged = merge(&base, &both, &llama(true)).unwrap();
    assert_eq!(read(&merged, EMBEDDING), (0..24).map(expected).collect::<Vec<_>>());
    assert_eq!(read(&merged, HEAD), [values(4, 51), weight[4..].to_vec()].concat());
    assert_eq!(config_of(&merged)["tie_word_embeddings"], false);
    let refused = |config: Value, shape: &[usize], parts: &[&str]| {
        let error =
            adapter(&config, &[(DELTA, shape)]).and_then(|tokens| merge(&base, &tokens, &llama(true)).map(|_| ()));
        let error = error.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error} has not {parts:?}");
    };
    refused(json!({"trainable_token_indices": [6, 1]}), &[2, 4], &["token 6", "6 rows"]);
    refused(json!({"trainable_token_indices": [1]}), &[2, 4], &["[1, 4]", "[2, 4]"]);
    refused(json!({"trainable_token_indices": [1, 2]}), &[2, 5], &["[2, 4]", "[2, 5]"]);
    refused(json!({"trainable_token_indices": {"shared": [1, 2]}}), &[2, 4], &["names none"]);
    refused(json!({"trainable_token_indices": "x"}), &[2, 4], &["trainable_token_indices", "\"x\""]);
}

/// Parameters of fused experts, `[experts, out, in]` or transposed, and the same in files with a tensor for each expert:
/// `delta[e, o, i] = scale * sum_r B[o, r, e] A[e, r, i]`.
#[test]
fn parameters_of_experts() {
    const EXPERTS: &str = "model.layers.0.mlp.experts";
    let name = |rest: &str| format!("{EXPERTS}{rest}");
    let config =
        json!({"r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]});
    // 3 experts, hidden 4, intermediate 5: gate_up_proj [3, 10, 4], the inner one; down_proj [3, 4, 5], the outer one.
    let tensors = [
        (name(".lora_A.weight"), [6, 5]),
        (name(".lora_B.weight"), [4, 6]),
        (name(".base_layer.lora_A.weight"), [6, 4]),
        (name(".base_layer.lora_B.weight"), [10, 6]),
    ];
    let tensors: Vec<(&str, &[usize])> =
        tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let pairs = adapter(&config, &tensors).unwrap();
    let down = (values(30, 50), values(24, 51));
    let gate_up = (values(24, 52), values(60, 53));
    let delta = |(a, b): &(Vec<f32>, Vec<f32>), d_in: usize, e: usize, o: usize, i: usize| {
        2.0 * product(2, |r| b[o * 6 + r * 3 + e], |r| a[(e * 2 + r) * d_in + i])
    };

    let (gate_up_name, down_name) = (name(".gate_up_proj"), name(".down_proj"));
    let base = model(&[(&gate_up_name, &[3, 10, 4]), (&down_name, &[3, 4, 5])]);
    let merged = merge(&base, &pairs, &json!({"model_type": "qwen3_moe"})).unwrap();
    let weight = values(120, 0);
    equal(
        &read(&merged, &gate_up_name),
        (0..120).map(|n| f64::from(weight[n]) + delta(&gate_up, 4, n / 40, n / 4 % 10, n % 4)),
    );
    let weight = values(60, 1);
    equal(
        &read(&merged, &down_name),
        (0..60).map(|n| f64::from(weight[n]) + delta(&down, 5, n / 20, n / 5 % 4, n % 5)),
    );

    // [experts, in, out], as gpt-oss has them.
    let base = model(&[(&gate_up_name, &[3, 4, 10]), (&down_name, &[3, 5, 4])]);
    let merged = merge(&base, &pairs, &json!({"model_type": "gpt_oss"})).unwrap();
    let weight = values(120, 0);
    equal(
        &read(&merged, &gate_up_name),
        (0..120).map(|n| f64::from(weight[n]) + delta(&gate_up, 4, n / 40, n % 10, n / 10 % 4)),
    );

    // A tensor for each expert and part, under the names of the hub.
    for [experts, gate, up, down_part] in
        [[EXPERTS, "gate_proj", "up_proj", "down_proj"], ["model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"]]
    {
        let mut base = TensorMap::new();
        for e in 0..3 {
            for (seed, (part, shape)) in [(gate, [5, 4]), (up, [5, 4]), (down_part, [4, 5])].into_iter().enumerate() {
                add(&mut base, &format!("{experts}.{e}.{part}.weight"), &shape, &values(20, 3 * e + seed));
            }
        }
        let merged = merge(&base, &pairs, &json!({"model_type": "mixtral"})).unwrap();
        for e in 0..3 {
            let of = |part: &str| read(&merged, &format!("{experts}.{e}.{part}.weight"));
            let weight = |seed: usize, n: usize| f64::from(values(20, 3 * e + seed)[n]);
            equal(&of(gate), (0..20).map(|n| weight(0, n) + delta(&gate_up, 4, e, n / 4, n % 4)));
            equal(&of(up), (0..20).map(|n| weight(1, n) + delta(&gate_up, 4, e, 5 + n / 4, n % 4)));
            equal(&of(down_part), (0..20).map(|n| weight(2, n) + delta(&down, 5, e, n / 5, n % 5)));
        }
    }
    // Shapes that fit nothing.
    let base = model(&[(&gate_up_name, &[3, 10, 3]), (&down_name, &[3, 4, 5])]);
    let error = merge(&base, &pairs, &json!({})).unwrap_err().to_string();
    assert!(error.contains("experts") && error.contains("[6, 4]") && error.contains("[10, 6]"), "{error}");
}

/// An adapter for each expert, as transformers 4 has them, on a file with fused experts.
#[test]
fn layers_of_experts_on_fused_ones() {
    let module = "model.layers.0.mlp.experts";
    let base = model(&[("model.layers.0.mlp.experts.gate_up_proj", &[2, 6, 4])]);
    let names = [("0.gate_proj", 3, 4), ("1.up_proj", 3, 4)];
    let tensors: Vec<(String, [usize; 2])> = names
        .iter()
        .flat_map(|(name, out, into)| {
            [
                (format!("{module}.{name}.lora_A.weight"), [1, *into]),
                (format!("{module}.{name}.lora_B.weight"), [*out, 1]),
            ]
        })
        .collect();
    let tensors: Vec<(&str, &[usize])> =
        tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    let pairs = adapter(&json!({"r": 1, "lora_alpha": 1}), &tensors).unwrap();
    let merged = merge(&base, &pairs, &json!({"model_type": "qwen3_moe"})).unwrap();
    let weight = values(48, 0);
    let (gate, up) = ((values(4, 50), values(3, 51)), (values(4, 52), values(3, 53)));
    equal(
        &read(&merged, "model.layers.0.mlp.experts.gate_up_proj"),
        (0..48).map(|n| {
            let (row, i) = (n / 4, n % 4);
            let delta = match row {
                0..3 => f64::from(gate.1[row]) * f64::from(gate.0[i]),
                9..12 => f64::from(up.1[row - 9]) * f64::from(up.0[i]),
                _ => 0.0,
            };
            f64::from(weight[n]) + delta
        }),
    );
}
