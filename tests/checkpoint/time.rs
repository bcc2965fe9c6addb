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

/// An adapter for these modules.
fn pairs(modules: impl Iterator<Item = String>) -> TensorMap<'static> {
    modules
        .flat_map(|module| {
            [("A", [4, 2]), ("B", [2, 4])].map(|(part, shape)| {
                tensor(&format!("base_model.model.{module}.lora_{part}.weight"), FloatType::F32, &shape, 1.0)
            })
        })
        .collect()
}

/// A JSON list of names.
fn list(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.map(|name| format!("\"{name}\"")).collect();
    format!("[{}]", names.join(","))
}

/// Many modules, many parameters that any module may have, and many modules that have pairs of their own.
#[test]
fn parameters_times_modules() {
    let tensors = pairs((0..500).map(|i| format!("layers.{i}.q_proj")));
    let names = |kind: &str| (0..10_000).map(|i| format!("{kind}{i}")).collect::<Vec<_>>().into_iter();
    let parameters = list(names("p"));
    let modules = list(names("m").chain(core::iter::once("q_proj".to_owned())));
    let config = format!(r#"{{"r": 4, "target_parameters": {parameters}, "target_modules": {modules}}}"#);
    let adapter = in_time(|| PeftAdapter::load(config.as_bytes(), &tensors)).unwrap();
    assert_eq!((adapter.modules().count(), adapter.parameters().count()), (500, 0));
    // Where no list names the modules, these are pairs of parameters.
    let config = format!(r#"{{"r": 4, "target_parameters": {parameters}, "target_modules": []}}"#);
    let adapter = in_time(|| PeftAdapter::load(config.as_bytes(), &tensors)).unwrap();
    assert_eq!((adapter.modules().count(), adapter.parameters().count()), (0, 500));
    in_time(|| MergedModel::new(&tensors, Some(&adapter), &MergeOptions::new())).unwrap_err();
}

/// Names with ranks of their own, none of which is that of a module.
#[test]
fn names_times_modules() {
    let tensors = pairs((0..20_000).map(|i| format!("layers.{i}.q_proj")));
    let names = |count| -> String {
        let names: Vec<String> = (0..count).map(|i| format!("\"{i}j\":2")).collect();
        format!(r#"{{"r": 4, "rank_pattern": {{{}}}}}"#, names.join(","))
    };
    assert_eq!(in_time(|| PeftAdapter::load(names(2000).as_bytes(), &tensors)).unwrap().modules().count(), 20_000);
    let error = in_time(|| PeftAdapter::load(names(400_000).as_bytes(), &tensors)).unwrap_err().to_string();
    assert!(error.contains("rank_pattern and alpha_pattern"), "{error}");
}

/// Tokens of many embeddings.
#[test]
fn tokens_times_modules() {
    let tensors: TensorMap<'static> = (0..20_000)
        .map(|i| {
            let name = format!("base_model.model.e{i}.token_adapter.trainable_tokens_delta");
            tensor(&name, FloatType::F32, &[1, 2], 1.0)
        })
        .collect();
    let tokens: Vec<String> = (0..40_000).map(|i| format!("\"e{}\":[1]", 39_999 - i)).collect();
    let config = format!(r#"{{"r": 4, "trainable_token_indices": {{{}}}}}"#, tokens.join(","));
    assert_eq!(in_time(|| PeftAdapter::load(config.as_bytes(), &tensors)).unwrap().tokens().len(), 20_000);
}

/// The experts of an adapter, each of which is a part of one tensor of the model.
#[test]
fn experts_of_fused_parameters() {
    let (layers, experts) = (40, 100);
    let base: TensorMap<'static> = (0..layers)
        .flat_map(|layer| {
            let fused = tensor(&format!("layers.{layer}.experts.down_proj"), FloatType::F32, &[experts, 2, 2], 1.0);
            let others =
                (0..400).map(move |i| tensor(&format!("layers.{layer}.m{i}.weight"), FloatType::F32, &[1], 1.0));
            core::iter::once(fused).chain(others)
        })
        .collect();
    let modules = (0..layers).flat_map(|l| (0..experts).map(move |e| format!("layers.{l}.experts.{e}.down_proj")));
    let adapter = PeftAdapter::load(br#"{"r": 4}"#, &pairs(modules)).unwrap();
    let merged = in_time(|| MergedModel::new(&base, Some(&adapter), &MergeOptions::new())).unwrap();
    assert_eq!(merged.merged().len(), layers * experts);
}

/// Modules of a model that names many as not quantized, by names and by expressions.
#[test]
fn names_that_are_not_quantized() {
    let modules = || (0..20_000).map(|i| format!("layers.{i}.q_proj"));
    let mut base: TensorMap<'static> =
        modules().map(|module| tensor(&format!("{module}.weight"), FloatType::F32, &[2, 2], 1.0)).collect();
    base.extend([tensor("layers.0.k_proj.weight_scale_inv", FloatType::F32, &[1], 1.0)]);
    let adapter = PeftAdapter::load(br#"{"r": 4}"#, &pairs(modules())).unwrap();
    let merged = |skipped: &str| {
        let config =
            format!(r#"{{"quantization_config": {{"quant_method": "fp8", "modules_to_not_convert": {skipped}}}}}"#);
        let options = MergeOptions::new().with_config(config.as_bytes());
        in_time(|| MergedModel::new(&base, Some(&adapter), &options).map(|merged| merged.merged().len()))
    };
    let names = list((0..200_000).map(|i| format!("x{i}")).chain(core::iter::once("q_proj".to_owned())));
    assert_eq!(merged(&names), Ok(20_000));
    let error = merged(&list((0..60).map(|i| format!("{}{i}", "[a-z.]{0,9}".repeat(30))))).unwrap_err().to_string();
    assert!(error.contains("modules_to_not_convert"), "{error}");
    assert_eq!(merged(r#"["layers\\.[0-9]+\\.q_proj"]"#), Ok(20_000));
}
