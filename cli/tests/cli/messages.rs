//! What reaches a terminal, a pipe or a full disk.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nf4::checkpoint::{FloatType, TensorMap};
use tempfile::tempdir;

use crate::files::{SHARDS, add, save, sharded};
use crate::run::{command, nf4};

/// Writes the clipboard, moves the cursor, forges a line, turns the text around.
const HOSTILE: &str = "w\u{1b}]52;c;ZXZpbA==\u{7}\u{9b}2K\r\nnf4: nothing wrong\u{202e}\u{2028}\t\u{7f}";

/// Nothing but printable characters and the ends of lines.
fn is_clean(text: &str) -> bool {
    text.chars().all(|c| c == '\n' || !(c.is_control() || "\u{202e}\u{2028}".contains(c)))
}

fn check(args: &[&str], code: i32) -> String {
    let mut all = String::new();
    for json in [&[][..], &["--json"]] {
        let outcome = nf4(&[json, args].concat());
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(is_clean(&outcome.stdout) && is_clean(&outcome.stderr), "{outcome:?}");
        let lines = outcome.stdout.lines().chain(outcome.stderr.lines());
        assert_eq!(lines.filter(|line| line.starts_with("nf4: nothing")).count(), 0, "{outcome:?}");
        if !json.is_empty() {
            let _: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        }
        all += &(outcome.stdout + &outcome.stderr);
    }
    all
}

#[test]
fn names_of_tensors() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let name = format!("{HOSTILE}.weight");
    let mut map = TensorMap::new();
    add(&mut map, &name, FloatType::F32, &[2, 32], &[0.5; 64]);
    save(Path::new(&path("dense")), &map);
    let mut map = TensorMap::new();
    add(&mut map, &name, FloatType::F32, &[2, 32], &[f32::NAN; 64]);
    save(Path::new(&path("nan")), &map);
    for (args, code) in [
        (&["inspect", "dense"][..], 0),
        (&["quantize", "dense", "--out", "packed", "--force"], 0),
        (&["quantize", "nan", "--out", "out"], 1),
        (&["inspect", "packed"], 0),
        (&["verify", "nan"], 3),
        (&["verify", "packed", "dense"], 0),
        (&["verify", "dense", "nan"], 3),
        (&["dequantize", "packed", "--out", "out", "--force"], 0),
        (&["merge", "dense", "--adapter", "dense", "--out", "out", "--force"], 1),
    ] {
        let paths = ["dense", "nan", "packed", "out"];
        let args: Vec<String> =
            args.iter().map(|a| if paths.contains(a) { path(a) } else { (*a).to_owned() }).collect();
        let shown = check(&args.iter().map(|a| &**a).collect::<Vec<_>>(), code);
        if ["inspect", "verify"].contains(&&*args[0]) && args.len() == 2 {
            assert!(shown.contains(r"w\u{1b}]52;c;ZXZpbA==\u{7}\u{9b}2K\r\nnf4"), "{shown}");
        }
    }
}

/// Index, configuration, names of files, descriptions of layers and of adapters.
#[test]
fn other_text_of_files() {
    let root = tempdir().unwrap();
    let model = root.path().join("model");
    sharded(&model, FloatType::F32);
    let (model_path, out) = (model.to_str().unwrap(), root.path().join("out"));
    let quantize = ["quantize", model_path, "--out", out.to_str().unwrap(), "--force"];
    #[cfg(unix)]
    {
        fs::create_dir(model.join(HOSTILE)).unwrap();
        check(&quantize, 0);
    }
    let index = model.join("model.safetensors.index.json");
    let good = fs::read(&index).unwrap();
    for map in [
        serde_json::json!({ HOSTILE: SHARDS[0] }),
        serde_json::json!({ HOSTILE: 7 }),
        serde_json::json!({ "x": HOSTILE }),
        serde_json::json!({ "x": format!("{HOSTILE}/y") }),
        serde_json::json!({ "x": [HOSTILE] }),
    ] {
        fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        check(&["inspect", model_path], 1);
    }
    fs::write(&index, &good).unwrap();
    for config in [
        serde_json::json!({ "quantization_config": { "quant_method": HOSTILE } }),
        serde_json::json!({ "model_type": HOSTILE, "quantization_config": HOSTILE }),
        serde_json::json!(HOSTILE),
    ] {
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        check(&quantize, 1);
    }
    let adapter = root.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    save(&adapter.join("adapter_model.safetensors"), &TensorMap::new());
    for config in [
        serde_json::json!({ "peft_type": HOSTILE }),
        serde_json::json!({ "peft_type": "LORA", "r": 8, "bias": HOSTILE }),
        serde_json::json!({ "peft_type": "LORA", "r": 8, "rank_pattern": { HOSTILE: "x" } }),
        serde_json::json!({ "peft_type": "LORA", "r": 8, "rank_pattern": { format!("({HOSTILE}"): 3 } }),
    ] {
        fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
        check(&["inspect", adapter.to_str().unwrap()], 1);
    }
    let header = serde_json::json!({ HOSTILE: { "dtype": HOSTILE, "shape": [2], "data_offsets": [0, 8] } }).to_string();
    let file = root.path().join("file");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
    fs::write(&file, bytes).unwrap();
    check(&["verify", file.to_str().unwrap()], 1);
}

/// However much a file says, a message is one that can be read.
#[test]
fn length_of_messages() {
    let root = tempdir().unwrap();
    let path = root.path().join("x.safetensors");
    let write = |header: &str, data: usize| {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        fs::write(&path, bytes).unwrap();
    };
    let ones = "1,".repeat(999_999) + "1";
    for (header, data, code) in [
        (format!(r#"{{"x":{{"dtype":"F32","shape":[{ones}],"data_offsets":[0,4]}}}}"#), 4, 0),
        (format!(r#"{{"x":{{"dtype":"F32","shape":[{ones}],"data_offsets":[0,8]}}}}"#), 8, 1),
        (format!(r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#, "x".repeat(1_000_000)), 4, 1),
        (format!(r#"{{"x":{{"dtype":"{}","shape":[1],"data_offsets":[0,4]}}}}"#, "x".repeat(1_000_000)), 4, 1),
    ] {
        write(&header, data);
        let outcome = nf4(&["inspect", path.to_str().unwrap()]);
        assert_eq!(outcome.code, Some(code), "{:.300}", outcome.stderr);
        let length = outcome.stdout.len() + outcome.stderr.len();
        assert!(length < 10_000, "{length} bytes");
    }
}

/// A result that cannot be written is a failure; a reader that went away is none.
#[cfg(target_os = "linux")]
#[test]
fn full_disks_and_closed_pipes() {
    let root = tempdir().unwrap();
    let file = root.path().join("x.safetensors");
    let mut map = TensorMap::new();
    add(&mut map, "x.weight", FloatType::F32, &[2, 32], &[0.5; 64]);
    save(&file, &map);
    let file = file.to_str().unwrap();
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    for args in [
        &["verify", file, "--json"][..],
        &["verify", file],
        &["inspect", file],
        &["bench", "--shape", "2x2", "--rounds", "1"],
        &["--help"],
        &["merge", "--help"],
        &["--version"],
    ] {
        let output = command(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("cannot write") && !error.contains("panicked"), "{error}");

        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    }
    // Nobody can be told, but the status stays what it is.
    for (args, code) in [(&["verify", "gone"][..], 1), (&["--json", "verify", "gone"], 1), (&["no-command"], 2)] {
        let output = command(args).stderr(full()).output().unwrap();
        let expected = if code == 2 { 1 } else { code };
        assert_eq!(output.status.code(), Some(expected), "{args:?}: {output:?}");
        let output = command(args).stdout(full()).stderr(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    }
    let closed = Command::new("sh")
        .args(["-c", "exec \"$0\" verify gone 2>&- >&-", env!("CARGO_BIN_EXE_nf4")])
        .status()
        .unwrap();
    assert_eq!(closed.code(), Some(1));
}
