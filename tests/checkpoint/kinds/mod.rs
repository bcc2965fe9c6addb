//! What adapters can change beside the weights of linear layers, each with the right value computed here in f64: the
//! formulas are those of PEFT's own merge.

mod added;
mod names;
mod replaced;

use nf4::checkpoint::{
    CheckpointError, FloatType, MergeOptions, MergedModel, PeftAdapter, TensorData, TensorMap, TensorSource,
};
use serde_json::{Value, json};

/// Values of a fixed sequence, between -1 and 1.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13 + 5) as f32 * 0.37).sin()).collect()
}

fn add(map: &mut TensorMap<'static>, name: &str, shape: &[usize], values: &[f32]) {
    add_as(map, name, FloatType::F32, shape, values);
}

fn add_as(map: &mut TensorMap<'static>, name: &str, float: FloatType, shape: &[usize], values: &[f32]) {
    let mut bytes = Vec::new();
    float.extend_bytes(values, &mut bytes);
    map.insert(name.to_owned(), TensorData::new(name, float.dtype(), shape.to_vec(), bytes).unwrap());
}

/// Tensors of these shapes, each with values of its own.
fn model(tensors: &[(&str, &[usize])]) -> TensorMap<'static> {
    let mut map = TensorMap::new();
    for (seed, (name, shape)) in tensors.iter().enumerate() {
        add(&mut map, name, shape, &values(shape.iter().product(), seed));
    }
    map
}

fn adapter(config: &Value, tensors: &[(&str, &[usize])]) -> Result<PeftAdapter, CheckpointError> {
    let mut map = TensorMap::new();
    for (seed, (name, shape)) in tensors.iter().enumerate() {
        add(&mut map, &format!("base_model.model.{name}"), shape, &values(shape.iter().product(), 50 + seed));
    }
    PeftAdapter::load(config.to_string().as_bytes(), &map)
}

fn read(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    FloatType::F32.values(&source.read(name).unwrap_or_else(|e| panic!("{e}")))
}

/// The merged model, with a `config.json`.
fn merge<'a>(
    base: &'a TensorMap<'a>,
    adapter: &'a PeftAdapter,
    config: &Value,
) -> Result<MergedModel<'a>, CheckpointError> {
    let config = config.to_string();
    MergedModel::new(base, Some(adapter), &MergeOptions::new().with_config(config.as_bytes()))
}

fn config_of(merged: &MergedModel<'_>) -> Value {
    serde_json::from_str(&merged.config().unwrap().unwrap()).unwrap()
}

/// `sum_k left[r, k] right[k, c]` in f64, for matrices given as functions.
fn product(rank: usize, left: impl Fn(usize) -> f32, right: impl Fn(usize) -> f32) -> f64 {
    (0..rank).map(|k| f64::from(left(k)) * f64::from(right(k))).sum()
}

/// Equal but for one rounding.
fn equal(got: &[f32], expected: impl Iterator<Item = f64>) {
    let mut count = 0;
    for (i, expected) in expected.enumerate() {
        assert!(
            (f64::from(got[i]) - expected).abs() <= expected.abs() * 6e-8 + 1e-12,
            "{i}: {}, not {expected}",
            got[i]
        );
        count += 1;
    }
    assert_eq!(got.len(), count);
}

fn llama(tied: bool) -> Value {
    json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "vocab_size": 6})
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
