//! The checkpoints of the reference data, which bitsandbytes and transformers made.

use std::fs;

use nf4::checkpoint::{TensorFile, TensorSource};
use tempfile::tempdir;

use crate::files::save;
use crate::run::{json, nf4, reference};
use crate::support::Tensors;

#[test]
fn inspect_a_model_of_transformers() {
    let path = reference("linear4bit/tiny_llama");
    let path = path.to_str().unwrap();
    let report = json(&["inspect", path]);
    assert_eq!(report["totals"]["nf4"]["count"], 7);
    assert_eq!(report["totals"]["nf4"]["weights"], 30720);
    assert_eq!(report["totals"]["other"]["count"], 5);
    let tensors = report["tensors"].as_array().unwrap();
    let layer = tensors.iter().find(|t| t["name"] == "model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!(layer["shape"], serde_json::json!([96, 64]));
    assert_eq!((&layer["block_size"], &layer["double_quant"]), (&64.into(), &true.into()));
    let text = nf4(&["inspect", path]);
    assert_eq!(text.code, Some(0));
    assert!(text.stdout.contains("model.layers.0.mlp.up_proj.weight"), "{}", text.stdout);
    let file = format!("{path}/model.safetensors");
    assert_eq!(json(&["inspect", &file])["totals"], report["totals"]);
}

#[test]
fn dequantize_a_model_of_transformers() {
    let root = tempdir().unwrap();
    let path = reference("linear4bit/tiny_llama");
    let out = root.path().join("out");
    json(&["dequantize", path.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    let (restored, expected) =
        (Tensors::load(&out.join("model.safetensors")), Tensors::load(&path.join("io.safetensors")));
    let mut compared = 0;
    for (name, tensor) in expected.iter() {
        if let Some(layer) = name.strip_suffix(".weight_dequantized_f32") {
            let ours = restored.iter().find(|(n, _)| n.ends_with(&format!("{layer}.weight"))).unwrap().1;
            assert_eq!(ours.bytes(), tensor.bytes(), "{layer}");
            assert_eq!(ours.shape, tensor.shape);
            compared += 1;
        }
    }
    assert_eq!(compared, 7);
    json(&["verify", path.to_str().unwrap(), out.to_str().unwrap()]);
}

/// The layers that bitsandbytes wrote: from the same weights `quantize` makes the same tensors, the JSON included.
#[test]
fn quantize_as_bitsandbytes_does() {
    for (case, nested) in [
        ("bf16_dq_f32compute", true),
        ("bf16_nodq_nobias", false),
        ("f16_dq_f32compute", true),
        ("f32_dq_bf16compute", true),
        ("f32_nodq_odd", false),
    ] {
        let root = tempdir().unwrap();
        let (input, output) = (root.path().join("in"), root.path().join("out"));
        let case = reference(&format!("linear4bit/{case}"));
        let theirs = fs::read(case.join("model.safetensors")).unwrap();
        let theirs = TensorFile::parse(&theirs).unwrap();
        let original = fs::read(case.join("io.safetensors")).unwrap();
        let original = TensorFile::parse(&original).unwrap();
        let mut map = nf4::checkpoint::TensorMap::new();
        for (from, to) in [("weight_original", "layer.weight"), ("bias", "layer.bias")] {
            let source: &dyn TensorSource = if from == "bias" { &theirs } else { &original };
            if let Some(info) = source.info(from) {
                let bytes = source.read(from).unwrap().into_owned();
                let tensor = nf4::checkpoint::TensorData::new(to, info.dtype, info.shape.clone(), bytes).unwrap();
                map.insert(to.to_owned(), tensor);
            }
        }
        save(&input, &map);
        let block = nf4::checkpoint::QuantState::load(&theirs, "weight").unwrap().block_size.get().to_string();
        let mut args = vec!["quantize", input.to_str().unwrap(), "--out", output.to_str().unwrap()];
        args.extend(["--block-size", &block]);
        if nested {
            args.push("--double-quant");
        }
        json(&args);
        let ours = fs::read(&output).unwrap();
        let ours = TensorFile::parse(&ours).unwrap();
        assert_eq!(ours.names().count(), theirs.names().count());
        for name in theirs.names() {
            let (a, b) = (ours.read(&format!("layer.{name}")).unwrap(), theirs.read(name).unwrap());
            assert_eq!(a, b, "{name} of {}", case.display());
            let info = ours.info(&format!("layer.{name}")).unwrap();
            assert_eq!(info.shape, theirs.info(name).unwrap().shape, "{name}");
        }
    }
}
