//! What replaces tensors of the base, and the types of both.

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, Linear4bit, MergeOptions, MergedModel, PeftAdapter, TensorData, TensorMap,
    TensorSource,
};
use nf4::{BlockSize, Quantized4Bit};
use serde_json::json;

use super::{EMBEDDING, HEAD, adapter, add, add_as, config_of, equal, llama, merge, model, read, values};

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
