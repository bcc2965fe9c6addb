//! Less memory than a file asks for is an error, not the end of the process.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use nf4::checkpoint::FloatType;
use tempfile::tempdir;

use crate::files::sharded;

/// Runs the tool with a limit on its address space, in MB.
fn limited(megabytes: u32, args: &[&str]) -> Output {
    let script = format!("ulimit -v {}; exec \"$0\" \"$@\"", megabytes * 1000);
    Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_nf4"), "--threads", "2"]).args(args).output().unwrap()
}

/// It must fail, and say that there is no memory, for how much, and in which file.
fn no_memory(megabytes: u32, args: &[&str], part: &str) {
    let output = limited(megabytes, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {:?} {error}", output.status.signal());
    assert!(error.contains("memory") && error.contains(part), "{args:?}: {error}");
}

/// A file with this header, and as much data as is asked for, which takes no room on the disk.
fn sparse(path: &Path, header: &str, data: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + data).unwrap();
}

/// Tensors of many GB.
#[test]
fn large_tensors() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let out = path("out");
    let (rows, cols) = (1_u64 << 16, 1_u64 << 16);
    let size = rows * cols * 4;
    let header = format!(r#"{{"x.weight":{{"dtype":"F32","shape":[{rows},{cols}],"data_offsets":[0,{size}]}}}}"#);
    sparse(Path::new(&path("dense.safetensors")), &header, size);
    no_memory(500, &["quantize", &path("dense.safetensors"), "--out", &out], "dense.safetensors");

    // A row of 4 GB.
    let long = 1_u64 << 30;
    let header = format!(r#"{{"x":{{"dtype":"F32","shape":[1,{long}],"data_offsets":[0,{}]}}}}"#, long * 4);
    sparse(Path::new(&path("row.safetensors")), &header, long * 4);
    for name in ["dense", "row"] {
        let name = path(&format!("{name}.safetensors"));
        assert_eq!(limited(500, &["inspect", &name]).status.code(), Some(0), "only the header is read");
    }

    // A layer whose scales alone are 268 MB, and its codes 2 GB.
    let state = format!(r#"{{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[{rows},{cols}]}}"#);
    let mut header = String::new();
    let mut end = 0;
    for (name, dtype, shape, size) in [
        ("x.weight.absmax", "F32", format!("{}", rows * cols / 64), rows * cols / 16),
        ("x.weight.quant_map", "F32", "16".to_owned(), 64),
        ("x.weight", "U8", format!("{},1", rows * cols / 2), rows * cols / 2),
        ("x.weight.quant_state.bitsandbytes__nf4", "U8", format!("{}", state.len()), state.len() as u64),
    ] {
        header +=
            &format!(r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{end},{}]}}"#, end + size);
        end += size;
    }
    let header = format!("{{{}}}", &header[1..]);
    let packed = path("packed.safetensors");
    sparse(Path::new(&packed), &header, end);
    {
        use std::os::unix::fs::FileExt;
        let start = 8 + header.len() as u64;
        let file = File::options().write(true).open(&packed).unwrap();
        let map: Vec<u8> = nf4::CODEBOOK.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.write_all_at(&map, start + rows * cols / 16).unwrap();
        file.write_all_at(state.as_bytes(), start + end - state.len() as u64).unwrap();
    }
    no_memory(200, &["dequantize", &packed, "--out", &out], "packed.safetensors");
    let output = limited(200, &["verify", &packed]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("memory"), "{output:?}");
    assert!(!Path::new(&out).exists());
    assert_eq!(limited(500, &["bench", "--shape", "32768x32768"]).status.code(), Some(1));
}

/// JSON that takes many times its own length.
#[test]
fn large_json() {
    let root = tempdir().unwrap();
    let model = root.path().join("model");
    sharded(&model, FloatType::F32);
    let text = format!(r#"{{"weight_map":{{}},"x":[{}1]}}"#, "1,".repeat(10_000_000));
    let index = model.join("model.safetensors.index.json");
    fs::write(&index, &text).unwrap();
    no_memory(500, &["inspect", model.to_str().unwrap()], "index.json");
    // More than any configuration has.
    fs::write(model.join("config.json"), &text).unwrap();
    let output = limited(500, &["inspect", model.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("more than 4000000 bytes"), "{error}");
    fs::remove_file(model.join("config.json")).unwrap();
    // A header.
    let header = format!(r#"{{"x":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(20_000_000));
    let file = root.path().join("x.safetensors");
    sparse(&file, &header, 1);
    no_memory(500, &["inspect", file.to_str().unwrap()], "x.safetensors");
}

/// Whatever the limit, a command does its work or says that it cannot.
#[test]
fn every_limit() {
    let root = tempdir().unwrap();
    let path = root.path().join("many.safetensors");
    let tensors = 5000;
    let entry =
        |i: usize| format!(r#""t{i}.weight":{{"dtype":"F32","shape":[1,1],"data_offsets":[{},{}]}}"#, i * 4, i * 4 + 4);
    let header = format!("{{{}}}", (0..tensors).map(entry).collect::<Vec<_>>().join(","));
    sparse(&path, &header, tensors as u64 * 4);
    let (path, out) = (path.to_str().unwrap(), root.path().join("out"));
    let out = out.to_str().unwrap();
    for args in
        [&["--json", "inspect", path][..], &["--json", "verify", path], &["quantize", path, "--out", out, "--force"]]
    {
        let (mut done, mut failed) = (0, 0);
        for megabytes in (20..=120).step_by(10) {
            let output = limited(megabytes, args);
            match output.status.code() {
                Some(0) => done += 1,
                Some(1) => failed += 1,
                code => panic!("{args:?} with {megabytes} MB: {code:?} {:?} {output:.300?}", output.status.signal()),
            }
        }
        println!("{args:?}: done {done}, refused {failed}");
        assert!(done > 0 && failed > 0, "done {done}, refused {failed}");
    }
}
