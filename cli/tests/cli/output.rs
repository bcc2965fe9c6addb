//! Outputs are whole or not there, and nothing is overwritten unasked.

use std::fs;
use std::time::Duration;

use nf4::checkpoint::{FloatType, TensorMap};
use tempfile::tempdir;

use crate::files::{SHARDS, add, save, sharded, weights};
use crate::run::{command, fails, json, names};

#[test]
fn force() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    sharded(&root.path().join("model"), FloatType::F32);
    let (model, out) = (path("model"), path("out"));
    json(&["quantize", &model, "--out", &out]);
    let config = fs::read(root.path().join("out/config.json")).unwrap();
    fs::write(root.path().join("out/stale.txt"), "old").unwrap();
    fails(&["quantize", &model, "--out", &out, "--double-quant"], &[&out, "--force"]);
    assert_eq!(fs::read(root.path().join("out/config.json")).unwrap(), config);
    json(&["quantize", &model, "--out", &out, "--double-quant", "--force"]);
    assert_ne!(fs::read(root.path().join("out/config.json")).unwrap(), config);
    assert!(!root.path().join("out/stale.txt").exists(), "the directory is replaced as a whole");
    assert_eq!(names(root.path()), ["model", "out"]);

    // Files.
    let (shard, file) = (format!("{model}/{}", SHARDS[0]), path("file"));
    fs::write(&file, "precious").unwrap();
    fails(&["quantize", &shard, "--out", &file], &[&file, "--force"]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    json(&["quantize", &shard, "--out", &file, "--force"]);
    json(&["verify", &file]);
}

/// `--force` takes neither the input, nor what holds it, nor what is no model.
#[test]
fn what_force_does_not_replace() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    sharded(&root.path().join("model"), FloatType::F32);
    let before = names(&root.path().join("model"));
    fails(&["quantize", &path("model"), "--out", &path("model"), "--force"], &["is, or holds, the input"]);
    let shard = format!("{}/{}", path("model"), SHARDS[0]);
    fails(&["quantize", &shard, "--out", &shard, "--force"], &["is, or holds, the input"]);
    fs::create_dir(root.path().join("home")).unwrap();
    fs::write(root.path().join("home/letter.txt"), "dear").unwrap();
    fails(&["quantize", &path("model"), "--out", &path("home"), "--force"], &["holds no model"]);
    fails(&["quantize", &shard, "--out", &path("home"), "--force"], &["is a directory"]);
    fs::write(root.path().join("file"), "text").unwrap();
    fails(&["quantize", &path("model"), "--out", &path("file"), "--force"], &["is a file"]);
    fails(&["quantize", &path("model"), "--out", &path("no/such/dir")], &["there is no directory"]);
    assert_eq!(names(&root.path().join("model")), before);
    assert_eq!(names(root.path()), ["file", "home", "model"]);
}

/// The last tensor cannot be quantized: all that was written before is removed, and what was at the output stays.
#[test]
fn failure_half_way() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let model = root.path().join("model");
    sharded(&model, FloatType::F32);
    json(&["quantize", &path("model"), "--out", &path("out")]);
    let good = fs::read(root.path().join("out/config.json")).unwrap();
    let mut values = weights(&[64, 96], 3);
    values[5 * 96 + 17] = f32::NAN;
    let mut map = TensorMap::new();
    add(&mut map, "z.weight", FloatType::F32, &[64, 96], &values);
    // The index does not name the tensor, but the shard holds it; the others are those that the index names.
    let old = fs::read(model.join(SHARDS[1])).unwrap();
    let file = nf4::checkpoint::TensorFile::parse(&old).unwrap();
    for (name, info) in file.header().iter() {
        let bytes = nf4::checkpoint::TensorSource::read(&file, name).unwrap().into_owned();
        let tensor = nf4::checkpoint::TensorData::new(name, info.dtype, info.shape.clone(), bytes).unwrap();
        map.insert(name.to_owned(), tensor);
    }
    save(&model.join(SHARDS[1]), &map);
    for out in ["new", "out"] {
        let parts = [SHARDS[1], "z.weight", "[5, 17]", "NaN"];
        fails(&["quantize", &path("model"), "--out", &path(out), "--force"], &parts);
        assert_eq!(names(root.path()), ["model", "out"]);
    }
    assert_eq!(fs::read(root.path().join("out/config.json")).unwrap(), good);
    // Machines are told as well.
    let output = command(&["--json", "quantize", &path("model"), "--out", &path("new")]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["error"].as_str().unwrap().contains("z.weight"), "{report}");
}

/// Killed at any time, the tool leaves no output or a whole one.
#[test]
fn killed() {
    let root = tempdir().unwrap();
    let mut map = TensorMap::new();
    for i in 0..8 {
        add(&mut map, &format!("layer{i}.weight"), FloatType::F32, &[512, 1024], &weights(&[512, 1024], i));
    }
    let input = root.path().join("in");
    save(&input, &map);
    let (mut absent, mut complete) = (0, 0);
    for attempt in 0..12_u32 {
        let out = root.path().join(format!("out{attempt}"));
        let mut child =
            command(&["quantize", input.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1"])
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
        std::thread::sleep(Duration::from_millis(u64::from(attempt) * 5));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            json(&["verify", out.to_str().unwrap(), input.to_str().unwrap()]);
            complete += 1;
        } else {
            absent += 1;
        }
    }
    println!("killed {} times: no output {absent}, a whole one {complete}", absent + complete);
    assert!(absent > 0, "the first kill comes at once");
}

/// Interrupted, it removes what it had begun.
#[cfg(unix)]
#[test]
fn interrupted() {
    let root = tempdir().unwrap();
    let mut map = TensorMap::new();
    for i in 0..8 {
        add(&mut map, &format!("layer{i}.weight"), FloatType::F32, &[512, 1024], &weights(&[512, 1024], i));
    }
    let input = root.path().join("in");
    save(&input, &map);
    let mut interrupted = 0;
    for signal in ["-INT", "-TERM", "-INT", "-TERM"] {
        let out = root.path().join("out");
        let args = ["quantize", input.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1", "--force"];
        let mut child = command(&args).stdout(std::process::Stdio::null()).spawn().unwrap();
        let started = || names(root.path()).iter().any(|name| name.contains("nf4-partial"));
        while !started() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        interrupted += u32::from(child.wait().unwrap().code() == Some(130));
        assert!(!started(), "{:?}", names(root.path()));
        if out.exists() {
            json(&["verify", out.to_str().unwrap(), input.to_str().unwrap()]);
        }
    }
    println!("interrupted {interrupted} times of 4");
}
