//! What commands read: through links, from what is no file, and who may read the result.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nf4::checkpoint::FloatType;
use tempfile::tempdir;

use crate::files::{SHARDS, sharded};
use crate::run::{command, contents, fails, json, names, reference};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A model whose files are links to those of `real`.
fn linked(root: &Path) -> PathBuf {
    sharded(&root.join("real"), FloatType::F32);
    let model = root.join("model");
    fs::create_dir(&model).unwrap();
    for name in names(&root.join("real")) {
        symlink(root.join("real").join(&name), model.join(&name)).unwrap();
    }
    model
}

/// Every file that is read is an input, wherever it is: a directory that holds one is not replaced.
#[test]
fn inputs_through_links() {
    for file in [SHARDS[0], SHARDS[1], "model.safetensors.index.json", "config.json", "tokenizer.json"] {
        let root = tempdir().unwrap();
        let model = linked(root.path());
        // All but this file are the model's own.
        for name in names(&model).iter().filter(|name| *name != file) {
            fs::remove_file(model.join(name)).unwrap();
            fs::copy(root.path().join("real").join(name), model.join(name)).unwrap();
        }
        let before = contents(&root.path().join("real"));
        let args = ["quantize", &text(&model), "--out", &text(&root.path().join("real")), "--force"];
        fails(&args, &["real is, or holds, the input", file]);
        assert_eq!(contents(&root.path().join("real")), before, "{file}");
    }
    // A link to a file is not replaced, nor what holds the file that it leads to; its own directory is no input.
    let root = tempdir().unwrap();
    sharded(&root.path().join("real"), FloatType::F32);
    let link = root.path().join("link");
    symlink(root.path().join("real").join(SHARDS[0]), &link).unwrap();
    let before = contents(&root.path().join("real"));
    let shard = format!("real/{}", SHARDS[0]);
    for (out, why) in [("link", "neither a regular file nor a directory"), (&shard, "is, or holds, the input")] {
        fails(&["quantize", &text(&link), "--out", &text(&root.path().join(out)), "--force"], &[out, why]);
    }
    assert_eq!(contents(&root.path().join("real")), before);
}

#[test]
fn adapters_through_links() {
    let case = reference("peft/rank8_nodq");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let root = tempdir().unwrap();
        let (real, adapter) = (root.path().join("real"), root.path().join("adapter"));
        fs::create_dir(&real).unwrap();
        fs::create_dir(&adapter).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(case.join(name), adapter.join(name)).unwrap();
            fs::copy(case.join(name), real.join(name)).unwrap();
        }
        fs::remove_file(adapter.join(file)).unwrap();
        symlink(real.join(file), adapter.join(file)).unwrap();
        // A base that is a directory, so that the output is one too.
        let base = root.path().join("base");
        fs::create_dir(&base).unwrap();
        fs::copy(case.join("base.safetensors"), base.join("model.safetensors")).unwrap();
        let before = contents(&real);
        let args = ["merge", &text(&base), "--adapter", &text(&adapter), "--out", &text(&real), "--force"];
        fails(&args, &["real is, or holds, the input", file]);
        assert_eq!(contents(&real), before);
    }
}

/// Runs a command, which must end within a time that no reader of a pipe without a writer would keep to.
fn ends(args: &[&str]) -> (Option<i32>, String) {
    let mut child = command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn pipe(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn pipes_and_devices() {
    let root = tempdir().unwrap();
    let out = text(&root.path().join("out"));
    for name in ["config.json", "model.safetensors.index.json", "model.safetensors", SHARDS[0], SHARDS[1]] {
        let model = root.path().join(format!("model-{name}"));
        sharded(&model, FloatType::F32);
        pipe(&model.join(name));
        for args in [
            &["inspect", &text(&model)][..],
            &["verify", &text(&model)],
            &["quantize", &text(&model), "--out", &out],
            &["dequantize", &text(&model), "--out", &out],
        ] {
            let (code, error) = ends(args);
            assert_eq!(code, Some(1), "{args:?}: {error}");
            assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        }
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let adapter = root.path().join(format!("adapter-{name}"));
        fs::create_dir(&adapter).unwrap();
        fs::copy(reference("peft/rank1/adapter_config.json"), adapter.join("adapter_config.json")).unwrap();
        pipe(&adapter.join(name));
        let base = reference("peft/rank1/base.safetensors");
        for args in
            [&["inspect", &text(&adapter)][..], &["merge", &text(&base), "--adapter", &text(&adapter), "--out", &out]]
        {
            let (code, error) = ends(args);
            assert_eq!(code, Some(1), "{args:?}: {error}");
            assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        }
    }
    for path in [Path::new("/dev/null"), Path::new("/dev/zero"), &root.path().join("pipe")] {
        if !path.starts_with("/dev") {
            pipe(path);
        }
        let (code, error) = ends(&["inspect", path.to_str().unwrap()]);
        assert_eq!((code, error.contains("not a regular file")), (Some(1), true), "{error}");
    }
    // What a model has beside its tensors is copied if it is a file.
    let model = root.path().join("model");
    sharded(&model, FloatType::F32);
    pipe(&model.join("tokenizer.json"));
    let report = json(&["quantize", &text(&model), "--out", &out]);
    assert!(report["not_copied"].as_array().unwrap().contains(&"tokenizer.json".into()), "{report}");
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Runs the tool with a mask.
fn masked(mask: &str, args: &[&str]) {
    let script = format!("umask {mask}; exec \"$0\" \"$@\"");
    let output = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_nf4")]).args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Nobody can do more with an output than with each of its inputs, but its owner, who may write it; and no more than the
/// user's mask says.
#[test]
fn permissions() {
    for (input, mask, expected) in [
        (0o600, "022", 0o600),
        (0o640, "022", 0o640),
        (0o644, "022", 0o644),
        (0o644, "077", 0o600),
        (0o666, "000", 0o666),
        (0o444, "022", 0o644),
        (0o755, "022", 0o644),
    ] {
        let root = tempdir().unwrap();
        let (model, out) = (root.path().join("model"), root.path().join("out"));
        sharded(&model, FloatType::F32);
        let file = model.join(SHARDS[1]);
        for name in names(&model) {
            chmod(&model.join(name), 0o666);
        }
        chmod(&file, input);
        // A file.
        masked(mask, &["quantize", &text(&file), "--out", &text(&out)]);
        assert_eq!(mode(&out), expected, "a file {input:o} with the mask {mask}");
        // A public file is replaced by a private one.
        chmod(&out, 0o666);
        masked(mask, &["quantize", &text(&file), "--out", &text(&out), "--force"]);
        assert_eq!(mode(&out), expected, "again");
        fs::remove_file(&out).unwrap();
        // A directory, one of whose files has these permissions.
        for (directory, expected_directory) in [(0o700, 0o700), (0o755, 0o755), (0o555, 0o755)] {
            chmod(&model, directory);
            masked(mask, &["quantize", &text(&model), "--out", &text(&out)]);
            let mask = u32::from_str_radix(mask, 8).unwrap();
            assert_eq!(mode(&out), expected_directory & !mask, "a directory {directory:o}");
            for name in names(&out) {
                assert_eq!(mode(&out.join(&name)), expected, "{name}");
            }
            fs::remove_dir_all(&out).unwrap();
        }
        chmod(&model, 0o755);
    }
    // A private adapter in a public base.
    let root = tempdir().unwrap();
    let (base, adapter, out) = (root.path().join("base"), root.path().join("adapter"), root.path().join("out"));
    fs::copy(reference("peft/rank1/base.safetensors"), &base).unwrap();
    chmod(&base, 0o644);
    fs::create_dir(&adapter).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(reference("peft/rank1").join(name), adapter.join(name)).unwrap();
        chmod(&adapter.join(name), 0o644);
    }
    chmod(&adapter.join("adapter_model.safetensors"), 0o600);
    masked("022", &["merge", &text(&base), "--adapter", &text(&adapter), "--out", &text(&out)]);
    assert_eq!(mode(&out), 0o600);
}
