//! Outputs are whole or not there, and nothing is overwritten unasked.

use std::fs;

use nf4::checkpoint::{FloatType, TensorMap};
use tempfile::tempdir;

use crate::files::{SHARDS, add, save, sharded, weights};
use crate::run::{command, fails, json, names, nf4};

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
    const TENSOR: &str = "model.layers.1.self_attn.v_proj.weight";
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let model = root.path().join("model");
    sharded(&model, FloatType::F32);
    json(&["quantize", &path("model"), "--out", &path("out")]);
    let good = fs::read(root.path().join("out/config.json")).unwrap();
    let mut values = weights(&[64, 96], 3);
    values[5 * 96 + 17] = f32::NAN;
    let mut map = TensorMap::new();
    add(&mut map, TENSOR, FloatType::F32, &[64, 96], &values);
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
        let parts = [SHARDS[1], TENSOR, "[5, 17]", "NaN"];
        fails(&["quantize", &path("model"), "--out", &path(out), "--force"], &parts);
        assert_eq!(names(root.path()), ["model", "out"]);
    }
    assert_eq!(fs::read(root.path().join("out/config.json")).unwrap(), good);
    // Machines are told as well.
    let output = command(&["--json", "quantize", &path("model"), "--out", &path("new")]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["error"].as_str().unwrap().contains(TENSOR), "{report}");
}

/// What is wrong with the place of an output is said before the work begins, which would fail as well.
#[test]
fn before_the_work() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let mut map = TensorMap::new();
    add(&mut map, "z.weight", FloatType::F32, &[2, 32], &[f32::NAN; 64]);
    save(&root.path().join("file"), &map);
    fs::create_dir(root.path().join("model")).unwrap();
    save(&root.path().join("model/model.safetensors"), &map);
    let before = names(root.path());
    let long = "n".repeat(256);
    for input in ["file", "model"] {
        fails(&["quantize", &path(input), "--out", &path("out")], &["z.weight", "NaN"]);
        for out in ["file", "model", "model/", "file/out", "gone/out", &long, "..", ".", "/"] {
            let out = path(out);
            for force in [&[][..], &["--force"]] {
                let outcome = nf4(&[&["quantize", &path(input), "--out", &out], force].concat());
                assert_eq!(outcome.code, Some(1), "{input} to {out}: {outcome:?}");
                assert!(!outcome.stderr.contains("NaN"), "{input} to {out}: {outcome:?}");
                assert_eq!(names(root.path()), before, "{input} to {out}");
            }
        }
    }
    fails(&["quantize", &path("file"), "--out", &path("new/")], &["new/", "name of a directory"]);
}

/// As long a name as the file system has room for.
#[test]
fn long_names() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    sharded(&root.path().join("model"), FloatType::F32);
    let file = format!("{}/{}", path("model"), SHARDS[0]);
    for length in [200, 240, 255] {
        for input in [&path("model"), &file] {
            let out = path(&"n".repeat(length));
            json(&["quantize", input, "--out", &out]);
            json(&["quantize", input, "--out", &out, "--force"]);
            json(&["verify", &out, input]);
            if input == &file { fs::remove_file(&out) } else { fs::remove_dir_all(&out) }.unwrap();
            assert_eq!(names(root.path()), ["model"]);
        }
    }
}
