//! `bench`: that it measures what it says, not how fast.

use nf4::Kernels;

use crate::run::{fails, json, nf4};

const OPERATIONS: [&str; 6] =
    ["dequantize bf16", "dequantize f32", "product 16x4", "product 8x8", "product f32", "quantize f32"];

#[test]
fn every_instruction_set() {
    for more in [&[][..], &["--batch", "3", "--double-quant", "--block-size", "32"]] {
        let args = [&["bench", "--shape", "64x96", "--rounds", "3"], more].concat();
        let report = json(&args);
        let results = report["results"].as_array().unwrap();
        for kernels in Kernels::available() {
            let of = |r: &&serde_json::Value| r["isa"] == kernels.isa().name();
            let mut names: Vec<_> = results.iter().filter(of).map(|r| r["operation"].as_str().unwrap()).collect();
            names.sort_unstable();
            assert_eq!(names, OPERATIONS, "{kernels:?}");
        }
        for result in results {
            assert!(result["gmac_per_s"].as_f64().unwrap() > 0.0, "{result}");
            assert!(result["share_of_read"].as_f64().unwrap() > 0.0, "{result}");
        }
        let text = nf4(&args);
        assert!(text.stdout.contains("GMAC/s") && text.stdout.contains("read"), "{}", text.stdout);
    }
    fails(&["bench", "--shape", "4294967296x4294967296"], &["4294967296x4294967296"]);
    fails(&["bench", "--batch", "0"], &["--batch 0"]);
}
