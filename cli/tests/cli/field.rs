//! Models and adapters as the field has them, merged and restored by the tool; see `tests/data/field/README.md`.

use std::fs;
use std::path::{Path, PathBuf};

use nf4::checkpoint::{Dtype, FloatType, TensorData, TensorMap};
use serde_json::{Value, json as value};
use tempfile::{TempDir, tempdir};

use crate::files::{add, save, sharded, weights};
use crate::run::{fails, json, names, nf4};
use crate::support::Tensors;

fn case(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/field");
    root.join(path).to_str().unwrap().to_owned()
}

/// A place for outputs.
struct Outputs(TempDir);

impl Outputs {
    fn new() -> Self {
        Self(tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn config(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name).join("config.json")).unwrap()).unwrap()
    }

    fn tensors(&self, name: &str) -> Tensors {
        Tensors::load(&self.path(name).join("model.safetensors"))
    }

    /// Merges the case's adapter into its base.
    fn merge(&self, name: &str, more: &[&str]) -> Value {
        let (base, adapter, out) = (case(&format!("{name}/base")), case(&format!("{name}/adapter")), self.text(name));
        json(&[&["merge", &base, "--adapter", &adapter, "--out", &out], more].concat())
    }
}

/// Every tensor of `right.safetensors` is in the output, to an ulp, and its notes hold these words.
fn is_right(outputs: &Outputs, name: &str, report: &Value, notes: &[&str]) {
    let (ours, right) = (outputs.tensors(name), Tensors::load(Path::new(&case(&format!("{name}/right.safetensors")))));
    for (tensor, expected) in right.iter() {
        let (_, got) = ours.iter().find(|(n, _)| *n == tensor).unwrap_or_else(|| panic!("{tensor} is missing"));
        assert_eq!((got.dtype, &got.shape), (expected.dtype, &expected.shape), "{tensor}");
        for (got, expected) in got.values::<f32>().iter().zip(expected.values::<f32>()) {
            assert!((got - expected).abs() <= expected.abs() * f32::EPSILON, "{tensor}: {got}, not {expected}");
        }
    }
    let said = report["notes"].to_string();
    assert!(notes.iter().all(|note| said.contains(note)), "{said} has not {notes:?}");
}

#[test]
fn right_values() {
    let outputs = Outputs::new();
    for (name, notes) in [
        ("adapter_wrapper_keys", &[][..]),
        ("lm_head_lora", &[]),
        ("resized_vocabulary", &["resized: model.embed_tokens.weight", "vocab_size from 16 to 18"]),
        (
            "score_head",
            &["added: score.weight", "LlamaForSequenceClassification", "3 labels", "removed: lm_head.weight"],
        ),
        ("tied_embed_only", &["untied: lm_head.weight", "added: lm_head.weight"]),
        ("tied_lm_head_lora", &["untied: lm_head.weight", "added: lm_head.weight"]),
    ] {
        let report = outputs.merge(name, &["--dtype", "f32"]);
        is_right(&outputs, name, &report, notes);
        json(&["verify", &outputs.text(name)]);
    }
    assert_eq!(outputs.config("resized_vocabulary")["vocab_size"], 18);
    assert_eq!(outputs.config("tied_embed_only")["tie_word_embeddings"], false);
    assert_eq!(outputs.config("tied_lm_head_lora")["tie_word_embeddings"], false);
    let config = outputs.config("score_head");
    assert_eq!(config["architectures"], value!(["LlamaForSequenceClassification"]));
    assert_eq!(config["id2label"].as_object().unwrap().len(), 3);
    // What is said is said to people too.
    let (base, adapter) = (case("tied_embed_only/base"), case("tied_embed_only/adapter"));
    let outcome = nf4(&["merge", &base, "--adapter", &adapter, "--out", &outputs.text("again")]);
    assert!(outcome.stdout.contains("\nuntied: lm_head.weight"), "{outcome:?}");
}

#[test]
fn restored_in_the_layout_of_the_model() {
    let outputs = Outputs::new();
    for name in ["gpt2_4bit", "param_4bit"] {
        let report = json(&["dequantize", &case(&format!("{name}/base")), "--out", &outputs.text(name)]);
        is_right(&outputs, name, &report, &[]);
        assert!(outputs.config(name).get("quantization_config").is_none());
        json(&["verify", &case(&format!("{name}/base"))]);
        json(&["verify", &case(&format!("{name}/base")), &outputs.text(name)]);
        json(&["verify", &outputs.text(name), &case(&format!("{name}/base"))]);
    }
    // Square, so that the shapes do not tell.
    let restored = outputs.path("gpt2_4bit").join("model.safetensors");
    let changed: TensorMap<'static> = Tensors::load(&restored)
        .iter()
        .map(|(name, t)| {
            let mut bytes = t.bytes().to_vec();
            if name.ends_with("attn.c_proj.weight") {
                let middle = bytes.len() / 2;
                bytes.rotate_left(middle);
            }
            (name.to_owned(), TensorData::new(name, t.dtype, t.shape.clone(), bytes).unwrap())
        })
        .collect();
    save(&restored, &changed);
    let outcome = nf4(&["verify", &case("gpt2_4bit/base"), &outputs.text("gpt2_4bit")]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(outcome.stdout.contains("attn.c_proj.weight: weight"), "{outcome:?}");
    let shown = json(&["inspect", &case("param_4bit/base")]);
    assert_eq!((&shown["totals"]["nf4"]["count"], &shown["not_understood"]), (&value!(3), &value!([])));
    let report = json(&[
        "merge",
        &case("param_4bit/base"),
        "--adapter",
        &case("param_4bit/adapter"),
        "--out",
        &outputs.text("x"),
    ]);
    assert_eq!(report["merged"], value!(["model.layers.0.self_attn.q_proj"]));
    assert!(outputs.tensors("x").iter().all(|(name, _)| !name.contains("quant_")));
}

#[test]
fn other_names() {
    let outputs = Outputs::new();
    let report = outputs.merge("names_vlm", &[]);
    assert_eq!(report["merged"], value!(["model.layers.0.self_attn.q_proj"]));
    assert!(report["notes"][0].as_str().unwrap().starts_with("renamed: \"language_model"), "{report}");
    let name = "model.layers.0.self_attn.q_proj.weight";
    let base = Tensors::load(&Path::new(&case("names_vlm/base")).join("model.safetensors"));
    assert_ne!(outputs.tensors("names_vlm").values::<f32>(name), base.values::<f32>(name));
}

#[test]
fn types_on_purpose() {
    let outputs = Outputs::new();
    let base = Tensors::load(&Path::new(&case("f32_parts/base")).join("model.safetensors"));
    for more in [&[][..], &["--dtype", "keep"], &["--dtype", "bf16"]] {
        outputs.merge("f32_parts", more);
        let merged = outputs.tensors("f32_parts");
        for (name, tensor) in merged.iter() {
            let (_, old) = base.iter().find(|(n, _)| *n == name).unwrap();
            assert_eq!(tensor.dtype, old.dtype, "{name}");
        }
        let name = "model.layers.0.mlp.gate.e_score_correction_bias";
        assert_eq!(merged.values::<f32>(name), base.values::<f32>(name));
        fs::remove_dir_all(outputs.path("f32_parts")).unwrap();
    }
}

#[test]
fn infinity_stays() {
    let outputs = Outputs::new();
    json(&["quantize", &case("config_infinity/base"), "--out", &outputs.text("q")]);
    json(&["dequantize", &case("config_infinity/packed"), "--out", &outputs.text("dq")]);
    outputs.merge("config_infinity", &[]);
    for name in ["q", "dq", "config_infinity"] {
        let text = fs::read_to_string(outputs.path(name).join("config.json")).unwrap();
        assert!(text.contains("    0.0,\n    Infinity\n"), "{text}");
    }
}

#[test]
fn refused() {
    let outputs = Outputs::new();
    let merge = |name: &str, parts: &[&str]| {
        let (base, adapter) = (case(&format!("{name}/base")), case(&format!("{name}/adapter")));
        fails(&["merge", &base, "--adapter", &adapter, "--out", &outputs.text("out")], parts);
        assert!(names(outputs.0.path()).is_empty());
    };
    merge("adapter_empty", &["adapter_empty/adapter", "no tensors"]);
    merge("adapter_pickle", &["adapter_model.bin", "pickle", "safetensors.torch.save_file"]);
    merge("quantized_otherwise_int8", &["base", "int8 of bitsandbytes", "q_proj"]);
    fails(&["dequantize", &case("quantized_otherwise_int8/base"), "--out", &outputs.text("out")], &["int8"]);
    fails(&["dequantize", &case("quantized_otherwise_mxfp4/base"), "--out", &outputs.text("out")], &["mxfp4"]);
    // A model whose weights are a pickle.
    fs::create_dir(outputs.path("pickle")).unwrap();
    fs::write(outputs.path("pickle").join("pytorch_model.bin"), "x").unwrap();
    fails(&["inspect", &outputs.text("pickle")], &["pytorch_model.bin", "pickle", "save_pretrained"]);
}

/// What a model is that `quantize` makes nothing of, though some of its weights are plain.
#[test]
fn quantized_already() {
    let outputs = Outputs::new();
    let refuses = |config: Value, add_more: &dyn Fn(&mut TensorMap<'static>), parts: &[&str]| {
        let model = outputs.path("model");
        fs::create_dir_all(&model).unwrap();
        let mut map = TensorMap::new();
        for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"] {
            add(&mut map, name, FloatType::BF16, &[64, 64], &weights(&[64, 64], 3));
        }
        add_more(&mut map);
        save(&model.join("model.safetensors"), &map);
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        fails(&["quantize", &outputs.text("model"), "--out", &outputs.text("out")], parts);
        assert_eq!(names(outputs.0.path()), ["model"]);
    };
    let llama = value!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
    let insert = |map: &mut TensorMap<'static>, name: &str, dtype: Dtype, shape: &[usize], len: usize| {
        map.insert(name.to_owned(), TensorData::new(name, dtype, shape.to_vec(), vec![1; len]).unwrap());
    };
    let down = "model.layers.0.mlp.down_proj";
    refuses(
        llama.clone(),
        &|map| insert(map, &format!("{down}.weight"), Dtype::F8_E4M3, &[64, 64], 4096),
        &[down, "FP8", "[64, 64]"],
    );
    refuses(llama.clone(), &|map| insert(map, &format!("{down}.qweight"), Dtype::I32, &[8, 64], 2048), &["GPTQ"]);
    refuses(
        llama.clone(),
        &|map| insert(map, &format!("{down}.weight"), Dtype::BF16, &[0], 0),
        &[down, "[0]", "ZeRO-3"],
    );
    for (section, word) in [
        (value!({"quant_method": "fp8"}), "fp8"),
        (value!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "4 bits"),
    ] {
        let nested =
            value!({"model_type": "llava", "text_config": {"model_type": "llama", "quantization_config": section}});
        refuses(nested, &|_| {}, &["config.json", word]);
    }
}

/// An adapter with a name of its own stands in a directory of that name.
#[test]
fn adapters_in_subdirectories() {
    let outputs = Outputs::new();
    for name in ["mine", "other"] {
        adapter(&outputs.path("adapters").join(name), "model.layers.0.self_attn.q_proj", [8, 8]);
    }
    let (base, adapters) = (case("lm_head_lora/base"), outputs.text("adapters"));
    fails(
        &["merge", &base, "--adapter", &adapters, "--out", &outputs.text("out")],
        &["adapter_config.json", "mine, other"],
    );
    fs::create_dir(outputs.path("empty")).unwrap();
    let args = ["merge", &base, "--adapter", &outputs.text("empty"), "--out", &outputs.text("out")];
    fails(&args, &["empty: no adapter_config.json"]);
}

/// What `verify` and `inspect` say of bytes that they do not understand.
#[test]
fn not_understood() {
    for (path, format) in [("quantized_otherwise_int8/base", "int8"), ("quantized_otherwise_mxfp4/base", "MXFP4")] {
        let outcome = nf4(&["verify", &case(path)]);
        assert_eq!(outcome.code, Some(3), "{outcome:?}");
        assert!(outcome.stdout.contains(format) && !outcome.stdout.contains("nothing wrong"), "{outcome:?}");
        let shown = json(&["inspect", &case(path)]);
        assert!(shown["not_understood"].to_string().contains(format), "{shown}");
    }
}

/// Attention beside experts in another format, which stay as they are with their description.
#[test]
fn kept_as_it_is() {
    let outputs = Outputs::new();
    let name = "quantized_otherwise_mxfp4";
    let report = outputs.merge(name, &[]);
    assert!(report["notes"].to_string().contains("kept: 2 tensors of mxfp4"), "{report}");
    let config: Value = serde_json::from_slice(&fs::read(case(&format!("{name}/base/config.json"))).unwrap()).unwrap();
    assert_eq!(outputs.config(name)["quantization_config"], config["quantization_config"]);
    let (merged, base) =
        (outputs.tensors(name), Tensors::load(&Path::new(&case(&format!("{name}/base"))).join("model.safetensors")));
    for (tensor, old) in base.iter() {
        let (_, new) = merged.iter().find(|(n, _)| *n == tensor).unwrap();
        assert_eq!((new.dtype, &new.shape), (old.dtype, &old.shape));
        assert_eq!(new.bytes() == old.bytes(), !tensor.contains("q_proj"), "{tensor}");
    }
}

/// Writes an adapter of rank 2 for one module, and returns its directory.
fn adapter(directory: &Path, module: &str, [d_out, d_in]: [usize; 2]) -> String {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#).unwrap();
    let mut map = TensorMap::new();
    for (part, shape) in [("lora_A", [2, d_in]), ("lora_B", [d_out, 2])] {
        let name = format!("base_model.model.{module}.{part}.weight");
        add(&mut map, &name, FloatType::F32, &shape, &weights(&shape, 9));
    }
    save(&directory.join("adapter_model.safetensors"), &map);
    directory.to_str().unwrap().to_owned()
}

/// What the adapter has for the tokenizer wins over the base's.
#[test]
fn files_of_the_adapter() {
    let outputs = Outputs::new();
    let linear = sharded(&outputs.path("base"), FloatType::BF16);
    let module = linear[0].0.strip_suffix(".weight").unwrap();
    let adapter = adapter(&outputs.path("adapter"), module, linear[0].1);
    for (directory, name, text) in [
        ("base", "special_tokens_map.json", "base"),
        ("base", "generation_config.json", "base"),
        ("base", "LICENSE", "base"),
        ("adapter", "tokenizer.json", "adapter"),
        ("adapter", "chat_template.jinja", "adapter"),
        ("adapter", "generation_config.json", "adapter"),
        ("adapter", "README.md", "adapter"),
        ("adapter", "training_args.bin", "adapter"),
    ] {
        fs::write(outputs.path(directory).join(name), text).unwrap();
    }
    let report = json(&["merge", &outputs.text("base"), "--adapter", &adapter, "--out", &outputs.text("out")]);
    let files = ["chat_template.jinja", "generation_config.json", "tokenizer.json"];
    assert_eq!(report["files_of_adapter"], value!(files));
    for name in files {
        assert_eq!(fs::read_to_string(outputs.path("out").join(name)).unwrap(), "adapter", "{name}");
    }
    for name in ["special_tokens_map.json", "LICENSE"] {
        assert_eq!(fs::read_to_string(outputs.path("out").join(name)).unwrap(), "base", "{name}");
    }
    assert!(!outputs.path("out").join("README.md").exists());
}

/// New tensors stand in the shard of those that they come from, and in the index.
#[test]
fn added_tensors_in_shards() {
    let outputs = Outputs::new();
    sharded(&outputs.path("base"), FloatType::F32);
    // The head goes, and is tied.
    let shard = outputs.path("base").join(crate::files::SHARDS[1]);
    let kept: TensorMap<'static> = Tensors::load(&shard)
        .iter()
        .filter(|(name, _)| *name != "lm_head.weight")
        .map(|(name, t)| {
            (name.to_owned(), TensorData::new(name, t.dtype, t.shape.clone(), t.bytes().to_vec()).unwrap())
        })
        .collect();
    save(&shard, &kept);
    let index = outputs.path("base").join("model.safetensors.index.json");
    let mut map: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    map["weight_map"].as_object_mut().unwrap().remove("lm_head.weight");
    fs::write(&index, map.to_string()).unwrap();
    let config = value!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": true});
    fs::write(outputs.path("base").join("config.json"), config.to_string()).unwrap();
    let adapter = adapter(&outputs.path("adapter"), "lm_head", [50, 96]);
    json(&["merge", &outputs.text("base"), "--adapter", &adapter, "--out", &outputs.text("out")]);
    let map: Value =
        serde_json::from_slice(&fs::read(outputs.path("out").join("model.safetensors.index.json")).unwrap()).unwrap();
    let (head, embedding) = (&map["weight_map"]["lm_head.weight"], &map["weight_map"]["model.embed_tokens.weight"]);
    assert_eq!(head, embedding);
    let shown = json(&["inspect", &outputs.text("out")]);
    assert_eq!(shown["totals"]["bytes"], map["metadata"]["total_size"]);
}

/// A directory as the hub's cache has it: links to blobs in a snapshot, which a reference names.
#[cfg(unix)]
#[test]
fn cache_of_the_hub() {
    let outputs = Outputs::new();
    let entry = outputs.path("models--owner--name");
    let snapshot = entry.join("snapshots/0123abcd");
    for directory in ["blobs", "refs", "snapshots/0123abcd", "snapshots/old"] {
        fs::create_dir_all(entry.join(directory)).unwrap();
    }
    for name in ["model.safetensors", "config.json"] {
        fs::copy(Path::new(&case("names_vlm/base")).join(name), entry.join("blobs").join(name)).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    let path = entry.to_str().unwrap();
    fails(&["inspect", path], &["models--owner--name", "0123abcd", "old"]);
    fs::write(entry.join("refs/main"), "0123abcd").unwrap();
    json(&["inspect", path]);
    json(&["merge", path, "--adapter", &case("names_vlm/adapter"), "--out", &outputs.text("out")]);
    fs::write(entry.join("refs/main"), "../../..").unwrap();
    fails(&["inspect", path], &["several snapshots"]);
    fs::remove_dir(entry.join("snapshots/old")).unwrap();
    json(&["inspect", path]);
    // Only the length of a name is read.
    fs::File::create(entry.join("refs/main")).unwrap().set_len(1 << 40).unwrap();
    json(&["inspect", path]);
}

/// Values that f16 cannot hold.
#[test]
fn overflow() {
    let outputs = Outputs::new();
    let mut map = TensorMap::new();
    add(&mut map, "a.weight", FloatType::F32, &[2, 2], &[1.0, 2.0, 1e6, 4.0]);
    save(&outputs.path("base"), &map);
    let adapter = adapter(&outputs.path("adapter"), "a", [2, 2]);
    let args = ["merge", &outputs.text("base"), "--adapter", &adapter, "--out", &outputs.text("out"), "--dtype", "f16"];
    fails(&args, &["a.weight", "value 2", "infinite as F16"]);
    assert_eq!(names(outputs.0.path()), ["adapter", "base"]);
    json(&[&args[..], &["--allow-overflow"]].concat());
    let merged = Tensors::load(&outputs.path("out"));
    assert_eq!(merged.iter().next().unwrap().1.dtype, Dtype::F16);
}
