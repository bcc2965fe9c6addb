//! `quantize` and `dequantize` on whole models.

use std::fs;
use std::path::Path;

use nf4::checkpoint::{FloatType, Linear4bit, QuantizationConfig, TensorFile, TensorMap, TensorSource};
use nf4::{BlockSize, Quantized4Bit};
use serde_json::Value;
use tempfile::tempdir;

use crate::files::{SHARDS, add, save, sharded, weights};
use crate::run::{fails, json, names, nf4};
use crate::support::Tensors;

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every type and block size, plain and nested: the layers are those of the library, the rest is what it was, and
/// `dequantize` restores what the library restores.
#[test]
fn sharded_models() {
    for (float, block, nested) in [
        (FloatType::F32, 64, false),
        (FloatType::F32, 32, true),
        (FloatType::BF16, 64, true),
        (FloatType::F16, 4096, false),
    ] {
        let root = tempdir().unwrap();
        let (old, new, back) = (root.path().join("old"), root.path().join("new"), root.path().join("back"));
        let linear = sharded(&old, float);
        let mut args = vec!["quantize", old.to_str().unwrap(), "--out", new.to_str().unwrap(), "--block-size"];
        let block_text = block.to_string();
        args.push(&block_text);
        if nested {
            args.push("--double-quant");
        }
        let report = json(&args);
        assert_eq!(report["quantized"].as_array().unwrap().len(), linear.len());
        assert_eq!(report["not_copied"], serde_json::json!(["pytorch_model.bin"]));
        let mut expected = vec!["config.json", "model.safetensors.index.json", "tokenizer.json"];
        expected.splice(1..1, SHARDS);
        assert_eq!(names(&new), expected);
        assert_eq!(names(root.path()), ["new", "old"], "nothing temporary stays");

        let config = QuantizationConfig::from_config(&fs::read(new.join("config.json")).unwrap()).unwrap().unwrap();
        assert_eq!((config.double_quant, config.compute_dtype), (nested, float));
        assert_eq!(config.skip_modules, None, "transformers leaves lm_head by itself");
        let index = read_json(&new.join("model.safetensors.index.json"));
        assert_eq!(index["metadata"]["total_parameters"], 2, "other metadata stay");
        assert_eq!(index["metadata"]["total_size"], report["bytes_after"]);

        let block = BlockSize::new(block).unwrap();
        for (i, shard) in SHARDS.iter().enumerate() {
            let bytes = fs::read(new.join(shard)).unwrap();
            let file = TensorFile::parse(&bytes).unwrap();
            assert_eq!(file.header().metadata()["format"], "pt");
            let before = Tensors::load(&old.join(shard));
            for name in file.names() {
                assert_eq!(index["weight_map"][name], *shard, "{name}");
            }
            for (name, [rows, cols], values) in &linear[i * 3..][..3] {
                let weight = Quantized4Bit::quantize(values, *rows, *cols, block, nested).unwrap();
                let prefix = name.strip_suffix(".weight").unwrap();
                for (name, tensor) in Linear4bit::new(weight, float).tensors(prefix) {
                    assert_eq!(*file.read(&name).unwrap(), *tensor.bytes(), "{name}");
                    assert_eq!(file.info(&name).unwrap().shape, tensor.shape(), "{name}");
                }
            }
            for (name, tensor) in before.iter().filter(|(name, _)| !linear.iter().any(|(n, ..)| n == name)) {
                assert_eq!(*file.read(name).unwrap(), *tensor.bytes(), "{name}");
            }
        }

        json(&["verify", new.to_str().unwrap(), old.to_str().unwrap()]);
        json(&["dequantize", new.to_str().unwrap(), "--out", back.to_str().unwrap()]);
        json(&["verify", back.to_str().unwrap(), new.to_str().unwrap()]);
        let config = read_json(&back.join("config.json"));
        assert!(config.get("quantization_config").is_none());
        assert_eq!(config["dtype"], float.torch_name());
        for (i, (name, [rows, cols], values)) in linear.iter().enumerate() {
            let weight = Quantized4Bit::quantize(values, *rows, *cols, block, nested).unwrap();
            let mut expected = Vec::new();
            float.extend_bytes(&weight.dequantize::<f32>(), &mut expected);
            let restored = Tensors::load(&back.join(SHARDS[i / 3]));
            assert_eq!(restored.get(name).bytes(), expected, "{name}");
            assert_eq!(restored.get(name).shape, [*rows, *cols]);
        }
    }
}

/// One thread and many give the same file, also where a weight is cut into many parts.
#[test]
fn threads_do_not_change_a_bit() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let mut map = TensorMap::new();
    add(&mut map, "a.weight", FloatType::F32, &[1000, 701], &weights(&[1000, 701], 5));
    save(&root.path().join("in"), &map);
    for nested in [false, true] {
        // No machine has as many as the last.
        let threads = ["1", "5", "18446744073709551615"];
        for threads in threads {
            let (input, out) = (path("in"), path(threads));
            let mut args = vec!["quantize", &input, "--out", &out, "--threads", threads, "--force"];
            if nested {
                args.push("--double-quant");
            }
            json(&args);
        }
        let file = fs::read(path("1")).unwrap();
        for threads in &threads[1..] {
            assert!(fs::read(path(threads)).unwrap() == file, "{threads} threads");
        }
        let layer = Linear4bit::load(&TensorFile::parse(&file).unwrap(), "a").unwrap();
        let expected = Quantized4Bit::quantize(&weights(&[1000, 701], 5), 1000, 701, BlockSize::B64, nested).unwrap();
        assert_eq!(layer.weight().packed(), expected.packed());
        assert_eq!(layer.weight().dequantize::<f32>(), expected.dequantize::<f32>());
    }
}

#[test]
fn skipped_modules() {
    let root = tempdir().unwrap();
    let (old, new) = (root.path().join("old"), root.path().join("new"));
    sharded(&old, FloatType::BF16);
    let (old, new) = (old.to_str().unwrap(), new.to_str().unwrap());
    let report = json(&["quantize", old, "--out", new, "--skip", "q_proj", "model.layers.1"]);
    assert_eq!(report["quantized"], serde_json::json!(["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]));
    let config = read_json(&Path::new(new).join("config.json"));
    let list = &config["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(*list, serde_json::json!(["lm_head", "q_proj", "model.layers.1"]));
    let report = json(&["quantize", old, "--out", new, "--quantize-head", "--skip", "layers.0", "--force"]);
    assert!(report["quantized"].as_array().unwrap().contains(&"lm_head".into()));
    fails(&["quantize", old, "--out", &format!("{new}-2"), "--skip", "model"], &["nothing to quantize", old]);
}

/// `Conv1D` holds the transposed weight; transformers quantizes what `nn.Linear` would hold, and names the layer the same.
#[test]
fn transposed_weights() {
    let root = tempdir().unwrap();
    let (old, new) = (root.path().join("old"), root.path().join("new"));
    fs::create_dir(&old).unwrap();
    fs::write(old.join("config.json"), r#"{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}"#).unwrap();
    // More than a chunk, blocks that straddle rows.
    let (rows, cols) = (701, 331);
    let stored = weights(&[cols, rows], 3);
    let linear: Vec<f32> = (0..rows * cols).map(|i| stored[i % cols * rows + i / cols]).collect();
    let mut map = TensorMap::new();
    add(&mut map, "h.0.attn.c_attn.weight", FloatType::F32, &[cols, rows], &stored);
    add(&mut map, "wte.weight", FloatType::F32, &[16, cols], &weights(&[16, cols], 4));
    save(&old.join("model.safetensors"), &map);
    let paths = [&old, &new].map(|p| p.to_str().unwrap());
    let report = json(&["quantize", paths[0], "--out", paths[1], "--threads", "3"]);
    assert_eq!(report["quantized"], serde_json::json!(["h.0.attn.c_attn"]));
    let bytes = fs::read(new.join("model.safetensors")).unwrap();
    let layer = Linear4bit::load(&TensorFile::parse(&bytes).unwrap(), "h.0.attn.c_attn").unwrap();
    assert_eq!((layer.weight().rows(), layer.weight().cols()), (rows, cols));
    let expected = Quantized4Bit::quantize(&linear, rows, cols, BlockSize::B64, false).unwrap();
    assert_eq!(layer.weight().packed(), expected.packed());
    assert_eq!(layer.weight().dequantize::<f32>(), expected.dequantize::<f32>());

    let mut spoilt = stored;
    spoilt[5 * rows + 7] = f32::NAN;
    add(&mut map, "h.0.attn.c_attn.weight", FloatType::F32, &[cols, rows], &spoilt);
    save(&old.join("model.safetensors"), &map);
    fails(&["quantize", paths[0], "--out", paths[1], "--force"], &["h.0.attn.c_attn.weight", "[5, 7]", "NaN"]);
}

/// What is quantized already is refused.
#[test]
fn refused_models() {
    let root = tempdir().unwrap();
    let (old, new) = (root.path().join("old"), root.path().join("new"));
    sharded(&old, FloatType::F32);
    let (path, new) = (old.to_str().unwrap(), new.to_str().unwrap());
    for (config, message) in [
        (r#"{"quantization_config": {"quant_method": "gptq"}}"#, "gptq"),
        ("[1, 2]", "config.json"),
        ("{", "config.json"),
    ] {
        fs::write(old.join("config.json"), config).unwrap();
        fails(&["quantize", path, "--out", new], &[path, message]);
    }
    fs::remove_file(old.join("config.json")).unwrap();
    json(&["quantize", path, "--out", new]);
    let again = format!("{new}-2");
    fails(&["quantize", new, "--out", &again], &["is a 4-bit layer already"]);
    fails(&["dequantize", path, "--out", &again], &["no 4-bit layers"]);
    assert_eq!(names(root.path()), ["new", "old"]);
}

/// With `--dtype` the whole model gets the type.
#[test]
fn dequantize_to_a_type() {
    let root = tempdir().unwrap();
    let (old, new, back) = (root.path().join("old"), root.path().join("new"), root.path().join("back"));
    sharded(&old, FloatType::F32);
    json(&["quantize", old.to_str().unwrap(), "--out", new.to_str().unwrap(), "--double-quant"]);
    json(&["dequantize", new.to_str().unwrap(), "--out", back.to_str().unwrap(), "--dtype", "bf16"]);
    for shard in SHARDS {
        let (packed, restored) = (fs::read(new.join(shard)).unwrap(), Tensors::load(&back.join(shard)));
        let packed = TensorFile::parse(&packed).unwrap();
        for (name, tensor) in restored.iter() {
            assert_eq!(tensor.dtype, safetensors::Dtype::BF16, "{name}");
            let values = match Linear4bit::load(&packed, name.trim_end_matches(".weight")) {
                Ok(layer) => layer.weight().dequantize::<f32>(),
                Err(_) => FloatType::F32.values(&packed.read(name).unwrap()),
            };
            let mut expected = Vec::new();
            FloatType::BF16.extend_bytes(&values, &mut expected);
            assert_eq!(tensor.bytes(), expected, "{name}");
        }
    }
    assert_eq!(read_json(&back.join("config.json"))["dtype"], "bfloat16");
}

#[test]
fn wrong_command_lines() {
    for args in [
        &["quantize"][..],
        &["quantize", "x", "--out", "y", "--block-size", "48"],
        &["merge", "x", "--adapter", "y", "--out", "z", "--dtype", "int8"],
        &["bench", "--shape", "12"],
        &["frobnicate"],
    ] {
        let outcome = nf4(args);
        assert_eq!((outcome.code, &*outcome.stdout), (Some(2), ""), "{outcome:?}");
    }
    for args in [&["--help"][..], &["quantize", "--help"], &["--version"]] {
        let outcome = nf4(args);
        assert_eq!((outcome.code, &*outcome.stderr), (Some(0), ""), "{outcome:?}");
    }
}
