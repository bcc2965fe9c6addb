//! `quantize` on models as they are found, in `tests/data/field`: what is right was made by transformers and bitsandbytes.

use std::fs;
use std::path::{Path, PathBuf};

use nf4::checkpoint::{TensorFile, TensorSource, packed_tensors};
use serde_json::Value;
use tempfile::tempdir;

use crate::run::json;

fn field(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/field").join(path)
}

/// The report, after the result was compared: the layers are transformers', all other tensors are as they were.
fn quantize(case: &str, flags: &[&str]) -> (Value, Value) {
    let (root, model) = (tempdir().unwrap(), field(case));
    let out = root.path().join("out");
    let report = json(&[&["quantize", model.to_str().unwrap(), "--out", out.to_str().unwrap()], flags].concat());
    let [given, made, right] =
        [model.join("model.safetensors"), out.join("model.safetensors"), field(&format!("{case}.right.safetensors"))]
            .map(|path| fs::read(path).unwrap());
    let [given, made, right] = [&given, &made, &right].map(|bytes| TensorFile::parse(bytes).unwrap());
    let layers = packed_tensors(&right);
    assert_eq!(packed_tensors(&made), layers, "{case}");
    for name in right.names() {
        assert_eq!(made.info(name).unwrap().shape, right.info(name).unwrap().shape, "{case}: {name}");
        // The text of the state is compared by what it means.
        if name.ends_with("bitsandbytes__nf4") {
            let [made, right] =
                [&made, &right].map(|f| serde_json::from_slice::<Value>(&f.read(name).unwrap()).unwrap());
            assert_eq!(made, right, "{case}: {name}");
        } else {
            assert_eq!(made.read(name).unwrap(), right.read(name).unwrap(), "{case}: {name}");
        }
    }
    let mut others = 0;
    for name in given.names().filter(|name| !layers.iter().any(|l| l == name)) {
        assert_eq!(made.read(name).unwrap(), given.read(name).unwrap(), "{case}: {name}");
        others += 1;
    }
    assert_eq!(made.names().count(), right.names().count() + others, "{case}");
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    (report, config["quantization_config"]["llm_int8_skip_modules"].clone())
}

#[test]
fn experts_stay() {
    for case in ["quantize_moe/mixtral", "quantize_moe/qwen3_moe"] {
        let (report, skip) = quantize(case, &[]);
        assert!(skip.is_null(), "{skip}");
        let warnings = report["warnings"].as_array().unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let warning = warnings[0].as_str().unwrap();
        assert!(warning.contains("6 weights stay") && warning.contains("experts"), "{warning}");
        // What is no Linear cannot be skipped, which changes nothing but is said.
        let (report, skip) = quantize(case, &["--skip", "gate", "experts"]);
        assert_eq!(skip, serde_json::json!(["lm_head", "gate", "experts"]));
        assert_eq!(report["warnings"].as_array().unwrap().len(), 3, "{report}");
    }
}

#[test]
fn tied_heads() {
    for (case, head) in
        [("quantize_tied_heads/bert", "cls.predictions.decoder"), ("quantize_tied_heads/whisper", "proj_out")]
    {
        let (report, skip) = quantize(case, &[]);
        assert!(skip.is_null() && report["skip_modules"].is_null(), "{skip}");
        assert_eq!(report["warnings"], serde_json::json!([]));
        let (_, skip) = quantize(case, &["--skip", "no_such_module"]);
        assert_eq!(skip, serde_json::json!([head, "no_such_module"]));
    }
}

#[test]
fn linears_called_embed() {
    for case in ["quantize_embed_linears/albert", "quantize_embed_linears/electra"] {
        let (report, skip) = quantize(case, &[]);
        assert!(skip.is_null(), "{skip}");
        assert_eq!(report["quantized"].as_array().unwrap().len(), 2, "{report}");
    }
}
