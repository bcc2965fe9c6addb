//! What adapters can change beside the weights of linear layers, each with the right value computed here in f64: the
//! formulas are those of PEFT's own merge.

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, Linear4bit, MergeOptions, MergedModel, Note, PeftAdapter, TensorData, TensorMap,
    TensorSource,
};
use nf4::{BlockSize, Quantized4Bit};
use serde_json::{Value, json};

/// Values of a fixed sequence, between -1 and 1.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13 + 5) as f32 * 0.37).sin()).collect()
}

fn add(map: &mut TensorMap<'static>, name: &str, shape: &[usize], values: &[f32]) {
    add_as(map, name, FloatType::F32, shape, values);
}

fn add_as(map: &mut TensorMap<'static>, name: &str, float: FloatType, shape: &[usize], values: &[f32]) {
    let mut bytes = Vec::new();
    float.extend_bytes(values, &mut bytes);
    map.insert(name.to_owned(), TensorData::new(name, float.dtype(), shape.to_vec(), bytes).unwrap());
}

/// Tensors of these shapes, each with values of its own.
fn model(tensors: &[(&str, &[usize])]) -> TensorMap<'static> {
    let mut map = TensorMap::new();
    for (seed, (name, shape)) in tensors.iter().enumerate() {
        add(&mut map, name, shape, &values(shape.iter().product(), seed));
    }
    map
}

fn adapter(config: &Value, tensors: &[(&str, &[usize])]) -> Result<PeftAdapter, CheckpointError> {
    let mut map = TensorMap::new();
    for (seed, (name, shape)) in tensors.iter().enumerate() {
        add(&mut map, &format!("base_model.model.{name}"), shape, &values(shape.iter().product(), 50 + seed));
    }
    PeftAdapter::load(config.to_string().as_bytes(), &map)
}

fn read(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    FloatType::F32.values(&source.read(name).unwrap_or_else(|e| panic!("{e}")))
}

/// The merged model, with a `config.json`.
fn merge<'a>(
    base: &'a TensorMap<'a>,
    adapter: &'a PeftAdapter,
    config: &Value,
) -> Result<MergedModel<'a>, CheckpointError> {
    let config = config.to_string();
    MergedModel::new(base, Some(adapter), &MergeOptions::new().with_config(config.as_bytes()))
}

fn config_of(merged: &MergedModel<'_>) -> Value {
    serde_json::from_str(&merged.config().unwrap().unwrap()).unwrap()
}

/// `sum_k left[r, k] right[k, c]` in f64, for matrices given as functions.
fn product(rank: usize, left: impl Fn(usize) -> f32, right: impl Fn(usize) -> f32) -> f64 {
    (0..rank).map(|k| f64::from(left(k)) * f64::from(right(k))).sum()
}

/// Equal but for one rounding.
fn equal(got: &[f32], expected: impl Iterator<Item = f64>) {
    let mut count = 0;
    for (i, expected) in expected.enumerate() {
        assert!(
            (f64::from(got[i]) - expected).abs() <= expected.abs() * 6e-8 + 1e-12,
            "{i}: {}, not {expected}",
            got[i]
        );
        count += 1;
    }
    assert_eq!(got.len(), count);
}

fn llama(tied: bool) -> Value {
    json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "vocab_size": 6})
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

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

/// A weight that was trained as a whole, and has an adapter besides; and one that stands twice.
#[test]
fn replaced_and_adapted() {
    let pair: [(&str, &[usize]); 2] = [("lm_head.lora_A.weight", &[1, 4]), ("lm_head.lora_B.weight", &[6, 1])];
    let config = json!({"r": 1, "lora_alpha": 1, "modules_to_save": ["lm_head"]});
    for name in ["lm_head.weight", "lm_head.base_layer.weight"] {
        let both = adapter(&config, &[pair[0], pair[1], (name, &[6, 4])]).unwrap();
        let base = model(&[(EMBEDDING, &[6, 4]), (HEAD, &[6, 4])]);
        let merged = merge(&base, &both, &llama(false)).unwrap();
        let (a, b, weight) = (values(4, 50), values(6, 51), values(24, 52));
        let sum = |n: usize| f64::from(weight[n]) + f64::from(a[n % 4]) * f64::from(b[n / 4]);
        equal(&read(&merged, HEAD), (0..24).map(sum));
        // The head is in 4 bits in the base.
        let packed = Quantized4Bit::quantize(&values(24, 9), 6, 4, BlockSize::B64, false).unwrap();
        let mut base = model(&[(EMBEDDING, &[6, 4])]);
        for (name, tensor) in Linear4bit::new(packed, FloatType::F32).tensors("lm_head") {
            let bytes = tensor.bytes().to_vec();
            base.insert(name.clone(), TensorData::new(&name, tensor.dtype(), tensor.shape().to_vec(), bytes).unwrap());
        }
        let merged = merge(&base, &both, &llama(false)).unwrap();
        equal(&read(&merged, HEAD), (0..24).map(sum));
        assert_eq!(merged.names().count(), 2);
    }
    let twice = [("m.q.base_layer.bias", &[3][..]), ("m.q.bias", &[3])];
    let error = adapter(&json!({"bias": "all"}), &twice).unwrap_err().to_string();
    assert!(error.contains("m.q.bias") && error.contains("two tensors"), "{error}");
    let twice = [("lm_head.weight", &[6, 4][..]), ("lm_head.modules_to_save.weight", &[6, 4])];
    let error = adapter(&config, &twice).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("two tensors"), "{error}");
}

/// The bias of the base counts, with its length.
#[test]
fn biases() {
    let tensors: [(&str, &[usize]); 3] =
        [("m.q.lora_A.weight", &[1, 4]), ("m.q.lora_B.weight", &[3, 1]), ("m.q.lora_B.bias", &[3])];
    let pairs = adapter(&json!({"r": 1, "lora_alpha": 3, "lora_bias": true}), &tensors).unwrap();
    let base = model(&[("m.q.weight", &[3, 4]), ("m.q.bias", &[3])]);
    let merged = MergedModel::new(&base, Some(&pairs), &MergeOptions::new()).unwrap();
    let (bias, added) = (values(3, 1), values(3, 52));
    equal(&read(&merged, "m.q.bias"), (0..3).map(|n| f64::from(bias[n]) + 3.0 * f64::from(added[n])));
    for (shape, parts) in [(&[4][..], ["[3]", "[4]"]), (&[2], ["[3]", "[2]"]), (&[3, 1], ["[3]", "[3, 1]"])] {
        let base = model(&[("m.q.weight", &[3, 4]), ("m.q.bias", shape)]);
        let error = MergedModel::new(&base, Some(&pairs), &MergeOptions::new()).unwrap_err().to_string();
        assert!(error.contains("m.q.bias") && parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let base = model(&[("m.q.weight", &[3, 4])]);
    let error = MergedModel::new(&base, Some(&pairs), &MergeOptions::new()).unwrap_err();
    assert_eq!(error, CheckpointError::Missing { tensor: "m.q.bias".to_owned() });
}

/// Values that a type cannot hold.
#[test]
fn overflow() {
    let mut base = TensorMap::new();
    add(&mut base, "a.weight", &[2, 2], &[1.0, 65504.0, 65519.9, 70000.0]);
    add(&mut base, "b.weight", &[3], &[1.0, f32::INFINITY, f32::NAN]);
    let options = MergeOptions::new().with_dtype(FloatType::F16);
    let merged = MergedModel::new(&base, None, &options).unwrap();
    let error = merged.read("a.weight").unwrap_err();
    assert_eq!(error.to_string(), "a.weight: value 3 is 7e4, which is infinite as F16");
    assert!(matches!(error, CheckpointError::TooLarge { index: 3, dtype: Dtype::F16, .. }));
    // What was infinite before stays so.
    merged.read("b.weight").unwrap();
    let merged = MergedModel::new(&base, None, &options.with_overflow()).unwrap();
    let bytes = merged.read("a.weight").unwrap();
    assert!(FloatType::F16.values(&bytes)[3].is_infinite());
    let mut base = TensorMap::new();
    add(&mut base, "m.q.weight", &[1, 1], &[3e38]);
    let tensors: [(&str, &[usize]); 2] = [("m.q.lora_A.weight", &[1, 1]), ("m.q.lora_B.weight", &[1, 1])];
    let mut map = TensorMap::new();
    for (name, _) in tensors {
        add(&mut map, &format!("base_model.model.{name}"), &[1, 1], &[1e19]);
    }
    let large = PeftAdapter::load(br#"{"r": 1, "lora_alpha": 4}"#, &map).unwrap();
    let merged = MergedModel::new(&base, Some(&large), &MergeOptions::new()).unwrap();
    let error = merged.read("m.q.weight").unwrap_err().to_string();
    assert!(error.contains("m.q.weight: value 0 is") && error.contains("infinite as F32"), "{error}");
}

/// Types that tensors keep, and the fields of parts of a configuration.
#[test]
fn types() {
    let mut base = TensorMap::new();
    add_as(&mut base, "model.language_model.layers.0.q.weight", FloatType::BF16, &[4, 4], &values(16, 0));
    add_as(&mut base, "model.visual.blocks.0.q.weight", FloatType::F16, &[2, 2], &values(4, 1));
    add_as(&mut base, "model.language_model.layers.0.gate", FloatType::F32, &[4], &values(4, 2));
    base.insert("step".to_owned(), TensorData::new("step", Dtype::I64, vec![], vec![0; 8]).unwrap());
    let config = json!({
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "model_type": "x"},
        "vision_config": {"torch_dtype": "float16", "model_type": "y"},
        "other_config": {"dtype": "int8"},
    });
    let config = config.to_string();
    let with = |dtype: Option<FloatType>| {
        let options = MergeOptions::new().with_config(config.as_bytes());
        let options = dtype.map_or(options, |dtype| options.with_dtype(dtype));
        let merged = MergedModel::new(&base, None, &options).unwrap();
        let dtypes: Vec<Dtype> = merged.names().map(|name| merged.info(name).unwrap().dtype).collect();
        let config = config_of(&merged);
        let fields = [&config["dtype"], &config["text_config"]["dtype"], &config["vision_config"]["torch_dtype"]];
        assert_eq!(config["other_config"]["dtype"], "int8");
        (dtypes, fields.map(|field| field.as_str().unwrap().to_owned()))
    };
    let (f32, f16, bf16, i64) = (Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64);
    let [b, h, s] = ["bfloat16", "float16", "float32"].map(str::to_owned);
    assert_eq!(with(None), (vec![f32, bf16, f16, i64], [b.clone(), b, h.clone()]));
    assert_eq!(with(Some(FloatType::F16)), (vec![f32, f16, f16, i64], [h.clone(), h.clone(), h]));
    assert_eq!(with(Some(FloatType::F32)), (vec![f32, f32, f32, i64], [s.clone(), s.clone(), s]));
}

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
    let config = json!({"model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": true, "vocab_size": 6});
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
