//! Files that are not what they say: always an error with names and numbers, never a panic.

use std::fs;
use std::path::Path;

use nf4::checkpoint::FloatType;
use tempfile::tempdir;

use crate::files::{SHARDS, sharded};
use crate::run::{fails, names, nf4};

const COMMANDS: [&str; 4] = ["inspect", "verify", "quantize", "dequantize"];

/// Every command must refuse the model and name all of `parts`.
fn refused(model: &Path, parts: &[&str]) {
    let (model, out) = (model.to_str().unwrap(), format!("{}-out", model.display()));
    for command in COMMANDS {
        let mut args = vec![command, model];
        if ["quantize", "dequantize"].contains(&command) {
            args.extend(["--out", &out]);
        }
        fails(&args, parts);
    }
    assert!(!Path::new(&out).exists());
}

/// A file with this header and this many bytes of data.
fn file(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).unwrap();
}

#[test]
fn headers() {
    let root = tempdir().unwrap();
    let path = root.path().join("x.safetensors");
    fs::write(&path, b"abc").unwrap();
    refused(&path, &["x.safetensors", "3 bytes"]);
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    refused(&path, &["x.safetensors", "18446744073709551615"]);
    fs::write(&path, [90_000_000_u64.to_le_bytes(), [0; 8]].concat()).unwrap();
    refused(&path, &["x.safetensors", "16", "90000008"]);
    file(&path, "{", 0);
    refused(&path, &["x.safetensors", "header"]);
    file(&path, "[]", 0);
    refused(&path, &["x.safetensors", "header"]);
    for (header, data, parts) in [
        (r#"{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#, 10, &["64", "10"][..]),
        (r#"{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#, 65, &["64", "65"]),
        (r#"{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,60]}}"#, 60, &["a.weight", "64", "60"]),
        (r#"{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[64,0]}}"#, 64, &["a.weight"]),
        (r#"{"a.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[8,72]}}"#, 72, &["a.weight", "8"]),
        (r#"{"a.weight":{"dtype":"F99","shape":[4,4],"data_offsets":[0,64]}}"#, 64, &["a.weight", "F99"]),
        (r#"{"a.weight":{"dtype":"F32","shape":[4,-4],"data_offsets":[0,64]}}"#, 64, &["a.weight"]),
        (
            r#"{"a.weight":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,64]}}"#,
            64,
            &["a.weight", "4294967296"],
        ),
        (
            r#"{"a.weight":{"dtype":"F32","shape":[1099511627776,4],"data_offsets":[0,17592186044416]}}"#,
            64,
            &["17592186044416", "64"],
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            6,
            &["b", "4", "2"],
        ),
    ] {
        file(&path, header, data);
        refused(&path, parts);
        refused(&path, &["x.safetensors"]);
    }
}

/// The name of a file need not be text.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let root = tempdir().unwrap();
    let path = |name: &[u8]| root.path().join(std::ffi::OsStr::from_bytes(name));
    let (dense, packed, restored) = (path(b"a\xff"), path(b"b\xff"), path(b"c\xff"));
    file(&dense, r#"{"x.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}"#, 64);
    for (command, input, out) in
        [("inspect", &dense, None), ("quantize", &dense, Some(&packed)), ("dequantize", &packed, Some(&restored))]
    {
        let out = out.map(|out| [Path::new("--out"), out]);
        let args: Vec<&Path> = [Path::new(command), input].into_iter().chain(out.into_iter().flatten()).collect();
        let outcome = nf4(&args);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
    }
    let outcome = nf4(&[Path::new("verify"), &packed, &restored]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

/// A 4-bit layer whose own description lies.
#[test]
fn descriptions() {
    let root = tempdir().unwrap();
    let path = root.path().join("x.safetensors");
    for state in [
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[1099511627776,1099511627776]}"#,
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[1099511627776,1048576]}"#,
        r#"{"quant_type":"nf4","blocksize":18446744073709551615,"dtype":"float32","shape":[8,8]}"#,
        r#"{"quant_type":"nf4","blocksize":0,"dtype":"float32","shape":[8,8]}"#,
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float128","shape":[8,8]}"#,
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":"large"}"#,
        r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32"}"#,
        r#"{"quant_type":"nf4""#,
    ] {
        let (len, name) = (state.len(), "a.weight.quant_state.bitsandbytes__nf4");
        let header = format!(
            r#"{{"{name}":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}},
            "a.weight":{{"dtype":"U8","shape":[32,1],"data_offsets":[{len},{}]}}}}"#,
            len + 32
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(state.as_bytes());
        bytes.resize(bytes.len() + 32, 0);
        fs::write(&path, bytes).unwrap();
        for command in ["inspect", "verify"] {
            let outcome = nf4(&[command, path.to_str().unwrap()]);
            assert_eq!(outcome.code, Some(3), "{outcome:?}");
            assert!(outcome.stdout.contains("a.weight"), "{outcome:?}");
        }
        let out = root.path().join("out");
        fails(&["dequantize", path.to_str().unwrap(), "--out", out.to_str().unwrap()], &["x.safetensors", "a.weight"]);
    }
}

#[test]
fn directories() {
    let root = tempdir().unwrap();
    let model = root.path().join("model");
    refused(&model, &["model", "No such file"]);
    fs::create_dir(&model).unwrap();
    refused(&model, &["model", "no model.safetensors"]);
    fs::remove_dir(&model).unwrap();

    sharded(&model, FloatType::F32);
    let index = model.join("model.safetensors.index.json");
    let good = fs::read_to_string(&index).unwrap();
    for (text, parts) in [
        ("{".to_owned(), &["index.json"][..]),
        ("[]".to_owned(), &["index.json", "object"]),
        ("{}".to_owned(), &["index.json", "weight_map"]),
        (r#"{"weight_map":{}}"#.to_owned(), &["index.json", "empty"]),
        (r#"{"weight_map":{"a":7}}"#.to_owned(), &["index.json", "tensor a", "7"]),
        (r#"{"weight_map":{"a":"../secret.safetensors"}}"#.to_owned(), &["index.json", "../secret.safetensors"]),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#.to_owned(), &["index.json", "/etc/passwd"]),
        (r#"{"weight_map":{"a":"gone.safetensors"}}"#.to_owned(), &["gone.safetensors"]),
        (good.replace("lm_head.weight", "head.weight"), &["index.json", "head.weight", SHARDS[1]]),
        (good.replace(SHARDS[1], SHARDS[0]), &["index.json", SHARDS[0]]),
    ] {
        fs::write(&index, text).unwrap();
        refused(&model, parts);
    }
    fs::write(&index, &good).unwrap();

    let shard = model.join(SHARDS[1]);
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 100]).unwrap();
    refused(&model, &[SHARDS[1]]);
    // The same tensor twice.
    fs::copy(model.join(SHARDS[0]), &shard).unwrap();
    let map: serde_json::Value = serde_json::from_str(&good).unwrap();
    let mut map = map["weight_map"].as_object().unwrap().clone();
    map.retain(|_, shard| shard == SHARDS[0]);
    map.insert("model.norm2".to_owned(), SHARDS[1].into());
    fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    refused(&model, &["model.norm2"]);
    map.insert("model.norm2".to_owned(), SHARDS[0].into());
    map.insert("model.embed_tokens.weight".to_owned(), SHARDS[1].into());
    map.remove("model.norm2");
    fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    refused(&model, &["is in", SHARDS[0], SHARDS[1]]);
    fs::remove_file(&shard).unwrap();
    refused(&model, &[SHARDS[1]]);
    assert_eq!(names(root.path()), ["model"]);
}
