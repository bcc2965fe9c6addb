//! Models and adapters as the field has them; see `tests/data/field/README.md`.

use std::path::{Path, PathBuf};

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, Linear4bit, MergeOptions, MergedModel, Note, PeftAdapter, TensorFile,
    TensorSource, foreign_tensors, packed_tensors,
};
use serde_json::Value;

/// A case, read whole.
struct Case {
    path: PathBuf,
    base: Vec<u8>,
    config: Vec<u8>,
}

impl Case {
    fn new(name: &str, base: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/field").join(name);
        let read = |file: &str| std::fs::read(path.join(base).join(file)).unwrap();
        Self { base: read("model.safetensors"), config: read("config.json"), path }
    }

    fn adapter(&self) -> Result<PeftAdapter, CheckpointError> {
        let read = |file: &str| std::fs::read(self.path.join("adapter").join(file)).unwrap();
        let (config, tensors) = (read("adapter_config.json"), read("adapter_model.safetensors"));
        PeftAdapter::load(&config, &TensorFile::parse(&tensors).unwrap())
    }

    /// Merges with the case's adapter, and checks what comes of it.
    fn merge(&self, dtype: Option<FloatType>, check: impl FnOnce(&TensorFile<'_>, &MergedModel<'_>, &Value)) {
        let (base, adapter) = (TensorFile::parse(&self.base).unwrap(), self.adapter().unwrap());
        self.plan(&base, Some(&adapter), dtype, check);
    }

    /// Restores the base.
    fn dequantize(&self, check: impl FnOnce(&TensorFile<'_>, &MergedModel<'_>, &Value)) {
        self.plan(&TensorFile::parse(&self.base).unwrap(), None, None, check);
    }

    fn plan(
        &self,
        base: &TensorFile<'_>,
        adapter: Option<&PeftAdapter>,
        dtype: Option<FloatType>,
        check: impl FnOnce(&TensorFile<'_>, &MergedModel<'_>, &Value),
    ) {
        let options = MergeOptions::new().with_config(&self.config);
        let options = dtype.map_or(options, |dtype| options.with_dtype(dtype));
        let merged = MergedModel::new(base, adapter, &options).unwrap();
        let config = merged.config().unwrap().unwrap();
        // Infinity is no JSON.
        check(base, &merged, &serde_json::from_str(&config).unwrap_or(Value::Null));
    }

    /// Every tensor of `right.safetensors` is in the merged model, to an ulp: the sums may be in another order.
    fn is_right(&self, merged: &dyn TensorSource) {
        self.is_within(merged, |expected, _| expected.abs() * f32::EPSILON);
    }

    /// As [`Self::is_right`], where the right value is a product in f32: as many roundings as it has terms, 16 and one for
    /// each rank.
    fn is_near(&self, merged: &dyn TensorSource) {
        self.is_within(merged, |_, largest| 32.0 * largest * f32::EPSILON);
    }

    /// `bound` gets the value and the largest one of its tensor.
    fn is_within(&self, merged: &dyn TensorSource, bound: impl Fn(f32, f32) -> f32) {
        let right = std::fs::read(self.path.join("right.safetensors")).unwrap();
        let right = TensorFile::parse(&right).unwrap();
        for (name, info) in right.header().iter() {
            let got = merged.info(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!((got.dtype, &got.shape), (info.dtype, &info.shape), "{name}");
            let [got, expected] = [merged.read(name).unwrap(), right.read(name).unwrap()].map(|b| f32s(&b));
            let largest = expected.iter().fold(0.0, |most, x| x.abs().max(most));
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let good = (got - expected).abs() <= bound(*expected, largest);
                assert!(good, "{}: {name}[{i}]: {got}, not {expected}", self.path.display());
            }
        }
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    FloatType::F32.values(bytes)
}

/// All tensors of the base but these are as they were.
fn others_stay(base: &TensorFile<'_>, merged: &dyn TensorSource, but: &[&str]) {
    for (name, info) in base.header().iter().filter(|(name, _)| !but.contains(name)) {
        assert_eq!(merged.info(name).map(|i| (i.dtype, &i.shape)), Some((info.dtype, &info.shape)), "{name}");
        assert!(merged.read(name).unwrap() == base.read(name).unwrap(), "{name}");
    }
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

#[test]
fn an_adapter_without_tensors() {
    let error = Case::new("adapter_empty", "base").adapter().unwrap_err().to_string();
    assert!(error.contains("no tensors"), "{error}");
}

#[test]
fn keys_of_wrappers() {
    let case = Case::new("adapter_wrapper_keys", "base");
    case.merge(Some(FloatType::F32), |base, merged, _| {
        case.is_right(merged);
        others_stay(base, merged, &[Q, EMBEDDING, HEAD]);
        assert!(merged.names().all(|name| !name.contains("original_module") && !name.contains("modules_to_save")));
    });
}

#[test]
fn infinity_in_a_configuration() {
    let case = Case::new("config_infinity", "base");
    case.merge(None, |_, merged, _| {
        let config = merged.config().unwrap().unwrap();
        assert!(config.contains("\"time_step_limit\": [\n    0.0,\n    Infinity\n  ]"), "{config}");
    });
    Case::new("config_infinity", "packed").dequantize(|_, merged, _| {
        let config = merged.config().unwrap().unwrap();
        assert!(config.contains("Infinity") && !config.contains("quantization_config"), "{config}");
    });
}

#[test]
fn parameters_that_are_f32_on_purpose() {
    let case = Case::new("f32_parts", "base");
    for (dtype, weights) in
        [(None, Dtype::BF16), (Some(FloatType::BF16), Dtype::BF16), (Some(FloatType::F16), Dtype::F16)]
    {
        case.merge(dtype, |base, merged, config| {
            for name in ["model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.0.linear_attn.A_log"] {
                assert_eq!(merged.info(name).unwrap().dtype, Dtype::F32, "{name}");
                assert!(merged.read(name).unwrap() == base.read(name).unwrap(), "{name}");
            }
            assert_eq!(merged.info(Q).unwrap().dtype, weights);
            assert_eq!(config["dtype"], if weights == Dtype::F16 { "float16" } else { "bfloat16" });
        });
    }
    case.merge(Some(FloatType::F32), |_, merged, _| {
        assert!(merged.names().all(|name| merged.info(name).unwrap().dtype == Dtype::F32));
    });
}

#[test]
fn conv1d_in_4_bits() {
    let case = Case::new("gpt2_4bit", "base");
    // The right values of the README: the restored weights, transposed.
    case.dequantize(|_, merged, config| {
        case.is_right(merged);
        assert!(config.get("quantization_config").is_none());
    });
    let adapter = case.adapter().unwrap();
    let pair = adapter.module("transformer.h.0.attn.c_proj").unwrap().adapter();
    let right = std::fs::read(case.path.join("right.safetensors")).unwrap();
    let right = TensorFile::parse(&right).unwrap();
    let name = "transformer.h.0.attn.c_proj.weight";
    case.merge(None, |_, merged, _| {
        let (got, base) = (f32s(&merged.read(name).unwrap()), f32s(&right.read(name).unwrap()));
        for (i, (got, base)) in got.iter().zip(&base).enumerate() {
            let (row, col) = (i / 8, i % 8);
            let product = |k: usize| f64::from(pair.b().data()[col * 2 + k]) * f64::from(pair.a().data()[k * 8 + row]);
            let expected = f64::from(*base) + 2.0 * (product(0) + product(1));
            assert!(
                (f64::from(*got) - expected).abs() <= expected.abs() * f64::from(f32::EPSILON),
                "{i}: {got} {expected}"
            );
        }
        let other = "transformer.h.0.mlp.c_fc.weight";
        assert!(merged.read(other).unwrap() == right.read(other).unwrap());
    });
    // Without the type of the model nothing says that it is transposed.
    let base = TensorFile::parse(&case.base).unwrap();
    let error = MergedModel::new(&base, None, &MergeOptions::new()).unwrap_err().to_string();
    assert!(error.contains("c_attn.weight") && error.contains("model_type"), "{error}");
}

#[test]
fn lora_on_the_output_head() {
    let case = Case::new("lm_head_lora", "base");
    case.merge(Some(FloatType::F32), |base, merged, config| {
        case.is_right(merged);
        others_stay(base, merged, &[Q, HEAD]);
        assert_eq!(config["tie_word_embeddings"], false);
        assert_eq!(merged.notes(), []);
    });
}

#[test]
fn names_of_another_class() {
    let case = Case::new("names_vlm", "base");
    case.merge(None, |base, merged, _| {
        others_stay(base, merged, &[Q]);
        assert!(merged.read(Q).unwrap() != base.read(Q).unwrap());
        assert_eq!(merged.merged(), ["model.layers.0.self_attn.q_proj"]);
        assert!(matches!(merged.notes(), [Note::Renamed { modules: 1, .. }]), "{:?}", merged.notes());
    });
}

#[test]
fn a_parameter_in_4_bits() {
    let case = Case::new("param_4bit", "base");
    let base = TensorFile::parse(&case.base).unwrap();
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    assert!(packed_tensors(&base).contains(&name.to_owned()));
    assert_eq!(Linear4bit::load_tensor(&base, name).unwrap().state().shape, [64, 32]);
    assert_eq!(foreign_tensors(&base), []);
    let check = |_: &TensorFile<'_>, merged: &MergedModel<'_>, config: &Value| {
        case.is_right(merged);
        assert!(merged.names().all(|name| !name.contains("quant_") && !name.contains("absmax")));
        assert!(config.get("quantization_config").is_none());
    };
    case.dequantize(check);
    case.merge(None, check);
}

#[test]
fn layers_in_another_format() {
    let case = Case::new("quantized_otherwise_int8", "base");
    let base = TensorFile::parse(&case.base).unwrap();
    let names: Vec<String> = foreign_tensors(&base).into_iter().map(|tensor| tensor.name).collect();
    let up = "model.layers.0.mlp.up_proj";
    assert_eq!(names, [format!("{up}.SCB"), format!("{up}.weight"), format!("{up}.weight_format")]);
    let adapter = case.adapter().unwrap();
    for adapter in [None, Some(&adapter)] {
        let options = MergeOptions::new().with_config(&case.config);
        let error = MergedModel::new(&base, adapter, &options).unwrap_err();
        assert!(matches!(error, CheckpointError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("int8"), "{error}");
        // The tensors tell without a configuration.
        let error = MergedModel::new(&base, adapter, &MergeOptions::new()).unwrap_err().to_string();
        assert!(error.contains("int8") && error.contains("up_proj"), "{error}");
    }
    // Attention is not packed, the configuration says so, and everything else stays.
    let case = Case::new("quantized_otherwise_mxfp4", "base");
    case.merge(None, |base, merged, config| {
        others_stay(base, merged, &[Q]);
        assert!(merged.read(Q).unwrap() != base.read(Q).unwrap());
        assert_eq!(config["quantization_config"]["quant_method"], "mxfp4");
        assert!(matches!(merged.notes(), [Note::KeptQuantization { tensors: 2, .. }]), "{:?}", merged.notes());
    });
    let base = TensorFile::parse(&case.base).unwrap();
    let options = MergeOptions::new().with_config(&case.config);
    let error = MergedModel::new(&base, None, &options).unwrap_err().to_string();
    assert!(error.contains("mxfp4"), "{error}");
    let adapter = case.adapter().unwrap();
    let error = MergedModel::new(&base, Some(&adapter), &options.with_dtype(FloatType::F32)).unwrap_err().to_string();
    assert!(error.contains("mxfp4"), "{error}");
}

#[test]
fn a_resized_vocabulary() {
    let case = Case::new("resized_vocabulary", "base");
    case.merge(Some(FloatType::F32), |base, merged, config| {
        case.is_right(merged);
        others_stay(base, merged, &[Q, EMBEDDING, HEAD]);
        assert_eq!((&config["vocab_size"], &config["tie_word_embeddings"]), (&18.into(), &false.into()));
        assert!(merged.notes().contains(&Note::Vocabulary { from: 16, to: 18 }), "{:?}", merged.notes());
    });
}

#[test]
fn a_head_that_only_the_adapter_has() {
    let case = Case::new("score_head", "base");
    case.merge(Some(FloatType::F32), |base, merged, config| {
        case.is_right(merged);
        others_stay(base, merged, &[Q, HEAD]);
        // As in PEFT's own merged model.
        assert!(merged.info(HEAD).is_none());
        assert_eq!(config["architectures"], serde_json::json!(["LlamaForSequenceClassification"]));
        assert_eq!(config["id2label"], serde_json::json!({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}));
        assert_eq!(config["label2id"], serde_json::json!({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}));
    });
}

/// Cases of `tests/upstream/field.py`: the right values are those with which PEFT's model computes.
#[test]
fn as_peft_computes() {
    for (name, notes) in [
        ("tied_tokens_head_lora", &["untied: lm_head.weight"][..]),
        ("tied_resized_head_lora", &["untied: lm_head.weight", "resized: model.embed_tokens.weight", "from 24 to 26"]),
        (
            "classifier_of_two_layers",
            &["added: classifier.dense.weight", "RobertaForSequenceClassification", "3 labels"],
        ),
        ("resized_wte", &["resized: transformer.wte.weight", "from 24 to 27"]),
        ("saved_by_ending", &[]),
        ("head_4bit_lora", &[]),
        ("head_twice", &["untied: lm_head.weight"]),
    ] {
        let case = Case::new(name, "base");
        case.merge(Some(FloatType::F32), |_, merged, config| {
            case.is_near(merged);
            let said: String = merged.notes().iter().map(|note| format!("{note}\n")).collect();
            assert!(notes.iter().all(|note| said.contains(note)), "{name}: {said} has not {notes:?}");
            assert!(!said.contains("renamed"), "{name}: {said}");
            if said.contains("untied") {
                assert_eq!(config["tie_word_embeddings"], false, "{name}");
            }
        });
    }
}

#[test]
fn tied_embeddings() {
    for (name, changed) in [("tied_embed_only", [Q, EMBEDDING].as_slice()), ("tied_lm_head_lora", &[])] {
        let case = Case::new(name, "base");
        case.merge(Some(FloatType::F32), |base, merged, config| {
            case.is_right(merged);
            others_stay(base, merged, changed);
            assert_eq!(config["tie_word_embeddings"], false, "{name}");
            let untied = Note::Untied { head: HEAD.to_owned(), embedding: EMBEDDING.to_owned() };
            assert!(merged.notes().contains(&untied), "{name}: {:?}", merged.notes());
            assert_eq!(merged.home(HEAD), if name == "tied_embed_only" { Some(EMBEDDING) } else { None });
        });
    }
}
