//! Files that are made to take long: the time grows with what they hold, and not with its square.

use core::time::Duration;
use std::time::Instant;

use nf4::checkpoint::{
    Dtype, FloatType, MergeOptions, MergedModel, PeftAdapter, TensorData, TensorMap, packed_tensors,
};

use crate::tensor;

/// Far more than the slowest machine needs, and far less than what is quadratic takes.
const LIMIT: Duration = Duration::from_secs(60);

fn in_time<T>(work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    result
}

/// 111 kB of expressions for 200 modules.
#[test]
fn expressions_times_modules() {
    let expressions: Vec<String> = (0..27).map(|i| format!(r#""({}){i}":4"#, "[a-z.]{0,9}".repeat(370))).collect();
    let config = format!(r#"{{"r": 4, "rank_pattern": {{{}}}}}"#, expressions.join(","));
    assert!(config.len() > 100_000);
    let mut tensors = TensorMap::new();
    for i in 0..200 {
        let module = format!("base_model.model.model.layers.{i}.self_attn.some_projection");
        tensors.extend([
            tensor(&format!("{module}.lora_A.weight"), FloatType::F32, &[4, 2], 1.0),
            tensor(&format!("{module}.lora_B.weight"), FloatType::F32, &[2, 4], 1.0),
        ]);
    }
    let error = in_time(|| PeftAdapter::load(config.as_bytes(), &tensors)).unwrap_err().to_string();
    assert!(error.contains("rank_pattern and alpha_pattern") || error.contains("size limit"), "{error}");
    // A few simple ones are no problem for many modules.
    let config = br#"{"r": 4, "rank_pattern": {"layers\\.[0-9]+\\.mlp\\..*": 8, "q_proj|k_proj": 2}}"#;
    assert_eq!(in_time(|| PeftAdapter::load(config, &tensors)).unwrap().modules().count(), 200);
}

/// As many modules that are saved as a whole as tensors.
#[test]
fn saved_modules_times_tensors() {
    let names: Vec<String> = (0..20_000).map(|i| format!("\"blocks.{i}.m\"")).collect();
    let config = format!(r#"{{"r": 4, "modules_to_save": [{}]}}"#, names.join(","));
    let tensors: TensorMap<'static> = (0..20_000)
        .map(|i| tensor(&format!("base_model.model.blocks.{i}.m.weight"), FloatType::F32, &[1], 1.0))
        .collect();
    assert_eq!(in_time(|| PeftAdapter::load(config.as_bytes(), &tensors)).unwrap().replaced().len(), 20_000);
}

/// Many layers of which only a part is there.
#[test]
fn many_broken_layers() {
    let tensors: TensorMap<'static> = (0..40_000)
        .map(|i| {
            let name = format!("layers.{i}.weight.absmax");
            (name.clone(), TensorData::new(&name, Dtype::F32, vec![1], vec![0; 4]).unwrap())
        })
        .collect();
    assert_eq!(in_time(|| packed_tensors(&tensors)).len(), 40_000);
    in_time(|| MergedModel::new(&tensors, None, &MergeOptions::new())).unwrap_err();
}
