//! Models made for the tests.

use std::fs;
use std::path::Path;

use nf4::checkpoint::{FloatType, TensorData, TensorMap, to_safetensors};
use serde_json::json;

use crate::support::Generator;

/// A tensor about normal, with a scale that differs from row to row.
pub(crate) fn weights(shape: &[usize], seed: u64) -> Vec<f32> {
    let mut generator = Generator(seed);
    let cols = *shape.last().unwrap_or(&1);
    let normal = (0..shape.iter().product::<usize>()).map(|i| {
        let scale = 0.01 * (1.0 + (i / cols % 7) as f32);
        generator.normal() * scale
    });
    normal.collect()
}

/// Adds a tensor of `values` in a type.
pub(crate) fn add(map: &mut TensorMap<'static>, name: &str, float: FloatType, shape: &[usize], values: &[f32]) {
    let mut bytes = Vec::new();
    float.extend_bytes(values, &mut bytes);
    map.insert(name.to_owned(), TensorData::new(name, float.dtype(), shape.to_vec(), bytes).unwrap());
}

pub(crate) fn save(path: &Path, map: &TensorMap<'static>) {
    fs::write(path, to_safetensors(map).unwrap()).unwrap();
}

pub(crate) const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Writes a small model in two shards: embeddings, norms, biases, two blocks of Linear layers, a head; and its other
/// files. Returns the names of the Linear weights of the blocks, their shapes, and their values in `float`.
pub(crate) fn sharded(directory: &Path, float: FloatType) -> Vec<(String, [usize; 2], Vec<f32>)> {
    fs::create_dir(directory).unwrap();
    let mut shards = [TensorMap::new(), TensorMap::new()];
    let mut linear = Vec::new();
    let mut seed = 0;
    for (block, shard) in shards.iter_mut().enumerate() {
        for (name, shape) in [("self_attn.q_proj", [64, 96]), ("mlp.up_proj", [128, 96]), ("mlp.gate_proj", [33, 47])] {
            seed += 1;
            let (name, values) = (format!("model.layers.{block}.{name}.weight"), weights(&shape, seed));
            add(shard, &name, float, &shape, &values);
            let mut bytes = Vec::new();
            float.extend_bytes(&values, &mut bytes);
            linear.push((name, shape, float.values(&bytes)));
        }
        add(shard, &format!("model.layers.{block}.mlp.up_proj.bias"), float, &[128], &weights(&[128], 77));
        add(shard, &format!("model.layers.{block}.norm.weight"), FloatType::F32, &[96], &weights(&[96], 78));
    }
    add(&mut shards[0], "model.embed_tokens.weight", float, &[50, 96], &weights(&[50, 96], 100));
    add(&mut shards[1], "lm_head.weight", float, &[50, 96], &weights(&[50, 96], 101));
    let mut map = serde_json::Map::new();
    for (name, shard) in SHARDS.iter().zip(&shards) {
        save(&directory.join(name), shard);
        map.extend(shard.keys().map(|tensor| (tensor.clone(), json!(name))));
    }
    let index = json!({ "metadata": { "total_size": 1, "total_parameters": 2 }, "weight_map": map });
    fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = json!({ "model_type": "llama", "dtype": float.torch_name(), "hidden_size": 96 });
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    fs::write(directory.join("tokenizer.json"), "{}").unwrap();
    fs::write(directory.join("pytorch_model.bin"), "weights in another format").unwrap();
    linear
}
