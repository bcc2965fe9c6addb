//! `merge`, and adapters in `inspect`.

use std::fs;
use std::path::Path;

use nf4::checkpoint::{FloatType, TensorMap};
use serde_json::json as value;
use tempfile::tempdir;

use crate::files::{SHARDS, add, save, sharded, weights};
use crate::run::{fails, json, names, reference};
use crate::support::Tensors;

/// Adapters that PEFT made, merged in f32; the tolerance is that of the reference data.
#[test]
fn adapters_of_peft() {
    for case in ["rank1", "rank8_nodq", "rank16_rslora", "rank8_dora"] {
        let root = tempdir().unwrap();
        let (directory, out) = (reference(&format!("peft/{case}")), root.path().join("out"));
        let (base, adapter) = (directory.join("base.safetensors"), directory.to_str().unwrap());
        let shown = json(&["inspect", adapter]);
        let base = base.to_str().unwrap();
        let report = json(&["merge", base, "--adapter", adapter, "--out", out.to_str().unwrap(), "--dtype", "f32"]);
        assert_eq!(report["merged"].as_array().unwrap().len(), shown["modules"].as_array().unwrap().len());
        let (merged, expected) = (Tensors::load(&out), Tensors::load(&directory.join("io.safetensors")));
        let mut compared = 0;
        for (name, tensor) in expected.iter().filter(|(name, _)| name.ends_with(".merged_f32")) {
            let weight = name.replace(".merged_f32", ".weight");
            let ours = merged.iter().find(|(n, _)| n.ends_with(&weight)).unwrap().1;
            let (ours, theirs) = (ours.values::<f32>(), tensor.values::<f32>());
            let largest = theirs.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let error = ours.iter().zip(&theirs).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(error <= 1e-6 * largest, "{case}: {name}: {error} of {largest}");
            compared += 1;
        }
        assert_eq!(compared, report["merged"].as_array().unwrap().len(), "{case}");
        let modules = shown["modules"].as_array().unwrap();
        assert!(modules.iter().all(|m| m["rank"].as_u64().unwrap() > 0));
    }
}

/// `--force` does not replace what the adapter is read from.
#[test]
fn an_adapter_is_an_input() {
    let root = tempdir().unwrap();
    let directory = reference("peft/rank1");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(directory.join(name), root.path().join(name)).unwrap();
    }
    let (base, adapter) = (directory.join("base.safetensors"), root.path().to_str().unwrap());
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let out = root.path().join(name);
        let before = fs::read(&out).unwrap();
        let args = ["merge", base.to_str().unwrap(), "--adapter", adapter, "--out", out.to_str().unwrap(), "--force"];
        fails(&args, &["is, or holds, the input"]);
        assert!(fs::read(&out).unwrap() == before, "{name}");
    }
}

/// Writes an adapter of rank 2 for one module.
fn adapter(directory: &Path, module: &str, [d_out, d_in]: [usize; 2], more: &[(&str, &[usize])]) -> TensorMap<'static> {
    fs::create_dir(directory).unwrap();
    let config = value!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["lm_head"] });
    fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
    let mut map = TensorMap::new();
    for (part, shape) in [("lora_A", [2, d_in]), ("lora_B", [d_out, 2])] {
        let name = format!("base_model.model.{module}.{part}.weight");
        add(&mut map, &name, FloatType::F32, &shape, &weights(&shape, 9));
    }
    for (name, shape) in more {
        add(&mut map, &format!("base_model.model.{name}"), FloatType::F32, shape, &weights(shape, 11));
    }
    save(&directory.join("adapter_model.safetensors"), &map);
    map
}

/// A model in shards, quantized and not: the adapted module changes by `2 B A`, the head is replaced, all floats get
/// the type.
#[test]
fn models_in_shards() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let linear = sharded(&path("dense"), FloatType::F32);
    let (name, shape, values) = &linear[4];
    let module = name.strip_suffix(".weight").unwrap();
    let a = adapter(&path("adapter"), module, *shape, &[("lm_head.weight", &[50, 96])]);
    json(&["quantize", &text("dense"), "--out", &text("packed")]);
    json(&["dequantize", &text("packed"), "--out", &text("restored")]);
    let tensor = |part: &str| FloatType::F32.values(a[&format!("base_model.model.{module}.{part}.weight")].bytes());
    let (lora_a, lora_b) = (tensor("lora_A"), tensor("lora_B"));
    let delta = |r: usize, c: usize| -> f64 {
        (0..2).map(|k| f64::from(lora_b[r * 2 + k]) * f64::from(lora_a[k * shape[1] + c])).sum::<f64>() * 2.0
    };
    for (base, before) in [("dense", "dense"), ("packed", "restored")] {
        let out = format!("merged-{base}");
        let report =
            json(&["merge", &text(base), "--adapter", &text("adapter"), "--out", &text(&out), "--dtype", "f32"]);
        assert_eq!(report["merged"], value!([module]));
        assert_eq!(report["replaced"], value!(["lm_head.weight"]));
        for (i, shard) in SHARDS.iter().enumerate() {
            let (old, new) = (Tensors::load(&path(before).join(shard)), Tensors::load(&path(&out).join(shard)));
            assert_eq!(old.iter().count(), new.iter().count());
            for (tensor, expected) in old.iter() {
                let ours = new.values::<f32>(tensor);
                if tensor == name {
                    assert_eq!(i, 1);
                    for (at, (new, old)) in ours.iter().zip(expected.values::<f32>()).enumerate() {
                        let exact = f64::from(old) + delta(at / shape[1], at % shape[1]);
                        // Products and sums in f64, in one order or the other, then one rounding.
                        let bound = f64::from(f32::EPSILON) * exact.abs() + 1e-12;
                        assert!((f64::from(*new) - exact).abs() <= bound, "{tensor} {at}: {new} {exact}");
                    }
                } else if tensor == "lm_head.weight" {
                    assert_eq!(ours, weights(&[50, 96], 11));
                } else {
                    assert_eq!(ours, expected.values::<f32>(), "{tensor}");
                }
            }
        }
    }
    assert_eq!(values.len(), shape[0] * shape[1]);
    json(&["merge", &text("packed"), "--adapter", &text("adapter"), "--out", &text("bf16"), "--dtype", "bf16"]);
    for shard in SHARDS {
        let merged = Tensors::load(&path("bf16").join(shard));
        assert!(merged.iter().all(|(_, t)| t.dtype == safetensors::Dtype::BF16));
    }
    let config = fs::read_to_string(path("bf16").join("config.json")).unwrap();
    assert!(config.contains("bfloat16") && !config.contains("quantization_config"), "{config}");
}

/// Adapters that do not fit are refused before anything is written.
#[test]
fn adapters_of_other_models() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let linear = sharded(&path("base"), FloatType::F32);
    let (name, [d_out, d_in], _) = &linear[0];
    let module = name.strip_suffix(".weight").unwrap();
    adapter(&path("shape"), module, [*d_out, d_in + 1], &[]);
    adapter(&path("unknown"), "model.layers.9.mlp.up_proj", [*d_out, *d_in], &[]);
    adapter(&path("head"), module, [*d_out, *d_in], &[("lm_head.weight", &[51, 96])]);
    adapter(&path("ia3"), module, [*d_out, *d_in], &[]);
    fs::write(path("ia3").join("adapter_config.json"), r#"{"peft_type": "IA3"}"#).unwrap();
    adapter(&path("broken"), module, [*d_out, *d_in], &[]);
    fs::write(path("broken").join("adapter_config.json"), "{").unwrap();
    fs::create_dir(path("empty")).unwrap();
    let before = names(root.path());
    for (adapter, parts) in [
        ("shape", &[module, "[64, 97]", "[64, 96]"][..]),
        ("unknown", &["model.layers.9.mlp.up_proj"]),
        ("head", &["lm_head.weight", "[51, 96]", "[50, 96]"]),
        ("ia3", &["IA3"]),
        ("broken", &["adapter_config.json"]),
        ("empty", &["adapter_config.json"]),
        ("missing", &["missing"]),
    ] {
        fails(&["merge", &text("base"), "--adapter", &text(adapter), "--out", &text("out")], parts);
        assert_eq!(names(root.path()), before);
    }
}
