//! PEFT adapters: those of the reference data, and the variants that these do not have.

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, Linear4bit, MergeOptions, MergedModel, PeftAdapter, PeftConfig, TargetModules,
    TensorData, TensorFile, TensorMap, TensorSource, to_safetensors,
};
use nf4::{LoRAAdapter, LoRAScaling};
use serde_json::{Value, json};

use crate::support::{Case, Checker, Tensors, check_kind};
use crate::tensor;

fn files(case: &Case) -> (Vec<u8>, Vec<u8>) {
    let read = |name| std::fs::read(case.path_of(name)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

#[test]
fn peft() {
    check_kind("peft", |c: &mut Checker, case: &Case| {
        let (config, model) = files(case);
        let adapter = PeftAdapter::load(&config, &TensorFile::parse(&model).unwrap()).unwrap();
        let base = std::fs::read(case.path_of("base.safetensors")).unwrap();
        let base = TensorFile::parse(&base).unwrap();
        let io = case.tensors_in("io.safetensors");
        let layers = case.info["layers"].as_array().unwrap();
        c.holds("modules", adapter.modules().count() == layers.len(), || format!("{}", adapter.modules().count()));
        for layer in layers {
            let name = layer["name"].as_str().unwrap();
            let module = format!("model.layers.0.{name}");
            let scale = f64::from(adapter.module(&module).unwrap().adapter().scale());
            let expected = case.info["scaling"][name].as_f64().unwrap();
            c.within(name, "scaling", &[scale], &[expected], |_| expected.abs() * f64::from(f32::EPSILON) / 2.0);

            let layer = adapter.layer(&module, Linear4bit::load(&base, &module).unwrap()).unwrap();
            let merged: Vec<f64> = layer.merge_to_f32().into_iter().map(f64::from).collect();
            let name = format!("{name}.merged_f32");
            let expected: Vec<f64> = reference(&io, &name).into_iter().map(f64::from).collect();
            let largest = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            // The reference rounds the same sum, computed in another order in f64, to f32 once: half an ulp each.
            c.within(&name, "merged weight", &merged, &expected, |_| largest * f64::from(f32::EPSILON));
        }
    });
}

fn reference(io: &Tensors, name: &str) -> Vec<f32> {
    let (_, tensor) = io.iter().find(|(key, _)| key.ends_with(name)).unwrap();
    tensor.values()
}

#[test]
fn writes_the_bytes_that_peft_wrote() {
    check_kind("peft", |c: &mut Checker, case: &Case| {
        let (config, model) = files(case);
        let adapter = PeftAdapter::load(&config, &TensorFile::parse(&model).unwrap()).unwrap();
        let (config_again, model_again) = adapter.to_files(FloatType::F32).unwrap();
        c.holds("adapter_model.safetensors", model_again == model, || "other bytes".to_owned());
        c.holds("adapter_config.json", config_again.as_bytes() == config, || config_again.clone());
    });
}

/// An adapter of one module, `[3, 5]` with rank 2, in this type.
fn small(float: FloatType) -> TensorMap<'static> {
    TensorMap::from([
        tensor("base_model.model.h.0.attn.q.lora_A.weight", float, &[2, 5], 0.25),
        tensor("base_model.model.h.0.attn.q.lora_B.weight", float, &[3, 2], -0.5),
    ])
}

fn load(config: &Value, tensors: &TensorMap<'_>) -> Result<PeftAdapter, CheckpointError> {
    PeftAdapter::load(config.to_string().as_bytes(), tensors)
}

#[test]
fn every_float_type_is_read_and_written() {
    for float in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        let tensors = small(float);
        let adapter = load(&json!({"r": 2}), &tensors).unwrap();
        let lora = adapter.module("h.0.attn.q").unwrap().adapter();
        assert_eq!((lora.rank(), lora.alpha(), lora.scale()), (2, 8.0, 4.0));
        assert_eq!(lora.a().data()[..3], [0.25, 0.5, 0.75]);
        let (_, file) = adapter.to_files(float).unwrap();
        assert!(file == to_safetensors(&tensors).unwrap(), "{float:?}");
    }
}

#[test]
fn patterns_match_ends_of_names_and_the_first_one_counts() {
    let config = |rank: &str, alpha: &str| {
        let text = format!(r#"{{"r": 4, "lora_alpha": 6, "rank_pattern": {rank}, "alpha_pattern": {alpha}}}"#);
        PeftConfig::parse(text.as_bytes()).unwrap()
    };
    // Not in the order of the alphabet: z before a.
    let c = config(r#"{"z|attn.q": 2, "a.*": 3, "q": 5}"#, r#"{"^h\\.0\\.attn\\.q": 1.5, "mlp\\.[ud]p": 16}"#);
    assert_eq!((c.rank("h.0.attn.q"), c.alpha("h.0.attn.q")), (2, 1.5));
    assert_eq!((c.rank("h.0.attn.k"), c.alpha("x.h.0.attn.q")), (3, 6.0));
    assert_eq!((c.rank("q"), c.rank("xq"), c.rank("q.x")), (5, 4, 4));
    assert_eq!((c.alpha("h.0.mlp.up"), c.alpha("h.0.mlp.up2")), (16.0, 6.0));
    // The order survives.
    let again = PeftConfig::parse(c.to_json().as_bytes()).unwrap();
    assert_eq!(again.rank("h.0.attn.q"), 2);
    assert_eq!(c.to_json(), again.to_json());
}

#[test]
fn made_adapters_keep_rank_alpha_scaling_and_magnitude_of_each_module() {
    let lora = |rank: usize, alpha: f64| {
        let (a, b) = ((0..rank * 5).map(|i| i as f32).collect(), vec![0.5; 3 * rank]);
        LoRAAdapter::from_parts(a, b, 3, 5, rank, alpha, LoRAScaling::RsLoRA).unwrap()
    };
    for dora in [false, true] {
        let with = |l: LoRAAdapter| if dora { l.with_magnitude(vec![1.0, 2.0, 3.0]).unwrap() } else { l };
        let modules = [("h.0.q", 4, 8.0), ("h.1.q", 2, 8.0), ("x.h.1.q", 4, 0.5)];
        let modules = modules.map(|(name, rank, alpha)| (name.to_owned(), with(lora(rank, alpha))));
        let adapter = PeftAdapter::new(modules.clone()).unwrap().with_field("task_type", "CAUSAL_LM".into());
        let (config, file) = adapter.to_files(FloatType::F32).unwrap();
        let again = PeftAdapter::load(config.as_bytes(), &TensorFile::parse(&file).unwrap()).unwrap();
        assert_eq!(again.config().fields()["task_type"], "CAUSAL_LM");
        for (name, made) in &modules {
            let read = again.module(name).unwrap().adapter();
            assert_eq!((read.rank(), read.alpha(), read.scale()), (made.rank(), made.alpha(), made.scale()), "{name}");
            assert_eq!((read.a().data(), read.b().data()), (made.a().data(), made.b().data()));
            assert_eq!(read.magnitude().map(|m| m.data().to_vec()), dora.then(|| vec![1.0, 2.0, 3.0]));
        }
        assert_eq!(again.to_files(FloatType::F32).unwrap(), (config, file));
    }
    let mixed = LoRAAdapter::new(3, 5, 2, 1.0, LoRAScaling::Standard, 0).unwrap();
    let error = PeftAdapter::new([("a".to_owned(), lora(2, 1.0)), ("b".to_owned(), mixed)]).unwrap_err();
    assert_eq!(error.to_string(), "b: rsLoRA for some modules only is not supported");
}

/// A key that is a name is compared; in a group it is an expression. Both match the same modules.
/// What could not be loaded again: matrices without elements, in either direction, and no matrices.
#[test]
fn empty_adapters_are_not_written() {
    for (d_out, d_in, empty) in [(0, 4, "lora_B"), (4, 0, "lora_A")] {
        let lora = LoRAAdapter::new(d_out, d_in, 2, 1.0, LoRAScaling::Standard, 0).unwrap();
        let error = PeftAdapter::new([("m".to_owned(), lora)]).unwrap().to_files(FloatType::F32).unwrap_err();
        assert!(matches!(&error, CheckpointError::Unexpected { tensor, .. } if tensor.contains(empty)), "{error}");
    }
    let error = PeftAdapter::new([]).unwrap().to_files(FloatType::F32).unwrap_err();
    assert!(matches!(error, CheckpointError::Unexpected { .. }), "{error}");
}

#[test]
fn names_match_what_they_match_as_expressions() {
    let keys = [
        "q", "^q", "attn.q", "^attn.q", r"attn\.q", r"^attn\.q", "", "^", ".", "..q", ".q", "q.", "Q", "ö", "a-b_c",
        "0.q", r"\^q", r"\\", r"a\.", r"^a\.b",
    ];
    let modules = [
        "q", "attn.q", "attnxq", "h.attn.q", "hattn.q", "h.attnxq", "h.attn.qq", "h.attn.Q", "", ".", "..", ".q", "x",
        "ö", "h.ö", "hö", "a-b_c", "x.a-b_c", "0.q", "10.q", "1.0.q", "^q", "h.^q", "a\nq", "a\n.q", "\n", "h.\n",
        "\\", "a.", "h.a.", "a.b", "axb", "x.a.b", "xq", "xxq", ".xq", "q.", "qx",
    ];
    let rank = |key: &str, module: &str| {
        PeftConfig::parse(json!({"r": 2, "rank_pattern": {key: 3}}).to_string().as_bytes()).unwrap().rank(module)
    };
    let mut matches = 0;
    for key in keys {
        for module in modules {
            let (name, expression) = (rank(key, module), rank(&format!("(?:{key})"), module));
            assert_eq!(name, expression, "{key:?} on {module:?}");
            matches += usize::from(name == 3);
        }
    }
    assert!(matches > keys.len(), "only {matches} matches");
}

#[test]
fn biases_and_whole_modules_replace_those_of_the_base() {
    let mut tensors = small(FloatType::F32);
    tensors.extend([
        tensor("base_model.model.h.0.attn.q.lora_B.bias", FloatType::F32, &[3], 1.0),
        tensor("base_model.model.h.0.attn.q.base_layer.bias", FloatType::BF16, &[3], 0.5),
        tensor("base_model.model.score.weight", FloatType::F16, &[2, 5], 2.0),
    ]);
    let config = json!({"r": 2, "lora_bias": true, "bias": "lora_only", "modules_to_save": ["score"],
        "target_modules": ".*q", "unknown_field": [1, 2]});
    let adapter = load(&config, &tensors).unwrap();
    assert_eq!(adapter.config().target_modules(), Some(&TargetModules::Expression(".*q".to_owned())));
    assert_eq!(adapter.replaced().keys().collect::<Vec<_>>(), ["h.0.attn.q.bias", "score.weight"]);
    let base = nf4::Quantized4Bit::quantize(&[0.0; 15], 3, 5, nf4::BlockSize::B64, false).unwrap();
    let layer = adapter.layer("h.0.attn.q", Linear4bit::new(base, FloatType::F32)).unwrap();
    // 0.5, 1, 1.5 from the base, plus 4 times 1, 2, 3.
    assert_eq!(layer.into_parts().1.unwrap(), [4.5, 9.0, 13.5]);
    let (config, file) = adapter.to_files(FloatType::F32).unwrap();
    assert!(file == to_safetensors(&tensors).unwrap());
    assert_eq!(serde_json::from_str::<Value>(&config).unwrap()["unknown_field"], json!([1, 2]));
}

#[test]
fn fan_in_fan_out_transposes_a_dense_base() {
    let weight: Vec<f32> = (0..15).map(|i| i as f32).collect();
    let transposed: Vec<f32> = (0..15).map(|i| weight[i % 3 * 5 + i / 3]).collect();
    let [plain, fan] = [false, true].map(|fan_in_fan_out| {
        load(&json!({"r": 2, "fan_in_fan_out": fan_in_fan_out}), &small(FloatType::F32)).unwrap()
    });
    let merge = |adapter: &PeftAdapter, values: &[f32], shape: [usize; 2]| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let name = "h.0.attn.q.weight";
        let base = TensorData::new(name, Dtype::F32, shape.to_vec(), bytes).unwrap();
        let base = TensorMap::from([(name.to_owned(), base)]);
        let merged = MergedModel::new(&base, Some(adapter), &MergeOptions::new())?;
        Ok::<_, CheckpointError>(FloatType::F32.values(&merged.read(name)?))
    };
    let a = merge(&plain, &weight, [3, 5]).unwrap();
    let b = merge(&fan, &transposed, [5, 3]).unwrap();
    assert_eq!(b, (0..15).map(|i| a[i % 3 * 5 + i / 3]).collect::<Vec<_>>());
    // Row 0 of A is 0.25, 0.5, ...; row 1 goes on with 1.5; row 0 of B is -0.5, -1.0; the scale is 4.
    assert_eq!(a[0], 4.0 * (-0.5 * 0.25 - 1.5));
    let error = merge(&plain, &b, [5, 3]).unwrap_err().to_string();
    assert!(error.contains("h.0.attn.q") && error.contains("[5, 3]") && error.contains("[3, 5]"), "{error}");
}

#[test]
fn variants_that_are_not_implemented_are_named() {
    for (field, value) in [
        ("peft_type", json!("IA3")),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
        ("layer_replication", json!([[0, 4]])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1})),
        ("monteclora_config", json!({"x": 1})),
        ("megatron_config", json!({"x": 1})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("olora")),
    ] {
        let error = load(&json!({"r": 2, field: value}), &small(FloatType::F32)).unwrap_err();
        assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(field), "{error}");
        load(&json!({"r": 2, field: null}), &small(FloatType::F32)).unwrap();
    }
    let error = load(&json!({"use_dora": true, "lora_bias": true}), &small(FloatType::F32)).unwrap_err();
    assert_eq!(error.to_string(), "adapter_config.json: lora_bias with use_dora is not supported");
}

#[test]
fn tensors_that_do_not_fit_are_named_with_their_numbers() {
    let prefix = "base_model.model.h.0.attn.q";
    let check = |config: Value, change: &dyn Fn(&mut TensorMap<'static>), expected: &[&str]| {
        let mut tensors = small(FloatType::F32);
        change(&mut tensors);
        let error = load(&config, &tensors).unwrap_err().to_string();
        assert!(expected.iter().all(|part| error.contains(part)), "{error} has not {expected:?}");
    };
    let add = |name: String, shape: &'static [usize]| {
        move |t: &mut TensorMap<'static>| t.extend([tensor(&name, FloatType::F32, shape, 1.0)])
    };
    let r2 = || json!({"r": 2});
    check(json!({"r": 8}), &|_| (), &["lora_A.weight", "[8, 5]", "[2, 5]"]);
    check(r2(), &add(format!("{prefix}.lora_B.weight"), &[3, 7]), &["lora_B.weight", "[3, 2]", "[3, 7]"]);
    check(r2(), &|t| drop(t.remove("base_model.model.h.0.attn.q.lora_B.weight")), &["q.lora_B.weight", "no such"]);
    check(r2(), &add(format!("{prefix}.lora_A.weight"), &[2, 5, 1, 1]), &["lora_A.weight", "[2, 5, 1, 1]"]);
    check(r2(), &add(format!("{prefix}.lora_magnitude_vector"), &[3]), &["lora_magnitude_vector", "use_dora"]);
    check(json!({"r": 2, "use_dora": true}), &|_| (), &["lora_magnitude_vector", "no such"]);
    let magnitude = add(format!("{prefix}.lora_magnitude_vector"), &[4]);
    check(json!({"r": 2, "use_dora": true}), &magnitude, &["lora_magnitude_vector", "[3]", "[4]"]);
    check(r2(), &add(format!("{prefix}.lora_diag"), &[2]), &["lora_diag", "not supported"]);
    check(
        r2(),
        &add("base_model.model.wte.lora_embedding_A".to_owned(), &[2, 2]),
        &["wte", "lora_embedding_B", "no such"],
    );
    check(r2(), &add("base_model.model.norm.weight".to_owned(), &[2]), &["norm.weight", "modules_to_save"]);
    check(r2(), &add("h.0.attn.q.lora_A.weight".to_owned(), &[2, 5]), &["h.0.attn.q", "base_model.model."]);
    check(json!({"r": 0}), &|_| (), &["r is 0"]);
    check(json!({"r": -3}), &|_| (), &["r is -3"]);
    check(json!({"r": 2, "lora_alpha": "x"}), &|_| (), &["lora_alpha", "\"x\""]);
    check(json!({"r": 2, "rank_pattern": {"(": 3}}), &|_| (), &["rank_pattern", "("]);
    check(json!({"r": 2, "rank_pattern": {"q": 0}}), &|_| (), &["rank_pattern", "q", "is 0"]);
    check(json!({"r": 2, "rank_pattern": {"(a{1000}){1000}": 3}}), &|_| (), &["rank_pattern", "a{1000}"]);
    check(json!([1]), &|_| (), &["adapter_config.json", "object"]);
    let nan = |t: &mut TensorMap<'static>| {
        t.extend([tensor(&format!("{prefix}.lora_A.weight"), FloatType::F32, &[2, 5], f32::NAN)])
    };
    check(r2(), &nan, &["h.0.attn.q", "lora_a", "NaN"]);

    let adapter = load(&r2(), &small(FloatType::F32)).unwrap();
    let base = nf4::Quantized4Bit::quantize(&[0.0; 12], 4, 3, nf4::BlockSize::B64, false).unwrap();
    let error = adapter.layer("h.0.attn.q", Linear4bit::new(base, FloatType::F32)).unwrap_err().to_string();
    assert!(error.contains("h.0.attn.q") && error.contains("[4, 3]") && error.contains("[3, 5]"), "{error}");
}
