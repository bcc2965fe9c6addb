//! How long `quantize` takes beside a copy of the file, which is synced as well. Not run by itself:
//! `cargo test --release -p nf4-cli --test cli -- --ignored --nocapture speed`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::tempdir;

use crate::files::weights;
use crate::run::json;

const MATRICES: usize = 16;
const SIDE: usize = 4096;
const ROUNDS: usize = 5;

/// Writes a file of 1 GiB of f32 weights, piece by piece.
fn make(path: &Path) {
    let size = SIDE * SIDE * 4;
    let entry = |i: usize| {
        let name = format!("model.layers.{i}.mlp.up_proj.weight");
        let (start, end) = (i * size, (i + 1) * size);
        format!(r#""{name}":{{"dtype":"F32","shape":[{SIDE},{SIDE}],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..MATRICES).map(entry).collect::<Vec<_>>().join(","));
    let piece: Vec<u8> = weights(&[SIDE, SIDE / 4], 1).iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for _ in 0..MATRICES * size / piece.len() {
        file.write_all(&piece).unwrap();
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

#[test]
#[ignore = "takes a minute and 2.2 GB of disk, and a quiet machine"]
fn speed() {
    let root = tempdir().unwrap();
    let (input, copy, out) = (root.path().join("in"), root.path().join("copy"), root.path().join("out"));
    make(&input);
    let (mut copies, mut plain, mut nested) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        fs::copy(&input, &copy).unwrap();
        // As the tool does.
        File::open(&copy).unwrap().sync_all().unwrap();
        copies.push(start.elapsed());
        fs::remove_file(&copy).unwrap();
        for (times, flags) in [(&mut plain, &[][..]), (&mut nested, &["--double-quant"])] {
            let args = [&["quantize", input.to_str().unwrap(), "--out", out.to_str().unwrap()], flags].concat();
            let start = Instant::now();
            json(&args);
            times.push(start.elapsed());
            fs::remove_file(&out).unwrap();
        }
    }
    let (copies, plain, nested) = (median(copies), median(plain), median(nested));
    println!("1 GiB of f32, medians of {ROUNDS}: copy {copies:.2} s, quantize {plain:.2} s, double {nested:.2} s");
    assert!(plain.max(nested) <= 3.0 * copies, "more than three times a copy");
}
