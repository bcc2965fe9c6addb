//! `nf4 inspect`: what a model holds.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use nf4::checkpoint::TensorInfo;
use serde_json::{Value, json};

use crate::adapters::Adapter;
use crate::layers::{Layer, Layers};
use crate::model::Model;
use crate::report::Prepared;
use crate::text::{Text, bytes, shape};

/// Show every tensor of a model or module of an adapter: shape, type, block size, scales, bits per weight; and totals.
///
/// Only headers are read, and the few hundred bytes in which each 4-bit layer describes itself.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  nf4 inspect Llama-3.2-1B-nf4
  nf4 inspect my-adapter
  nf4 inspect model.safetensors --json | jq .totals")]
pub(crate) struct Inspect {
    /// A model directory, a directory with a PEFT adapter, or a safetensors file
    path: PathBuf,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<Prepared> {
        if Adapter::is_at(&self.path)? {
            return Adapter::open(&self.path)?.inspect();
        }
        let model = Model::open(&self.path)?;
        let layers = Layers::read(&model);
        let mut rows =
            vec![["tensor", "shape", "type", "block", "scales", "bits/weight", "bytes"].map(str::to_owned).into()];
        let (mut list, mut packed, mut dense) = (Vec::new(), Total::default(), Total::default());
        for shard in &model.shards {
            for name in shard.names() {
                let Some(info) = shard.header.get(name) else { continue };
                if let Some(layer) = layers.by_tensor.get(name) {
                    packed.add(&layer.state.shape, layer.bytes);
                    rows.push(layer_row(name, layer));
                    list.push(layer_json(name, layer, shard.name()));
                } else if !layers.companions.contains(name) {
                    let size = (info.data_offsets.1 - info.data_offsets.0) as u64;
                    dense.add(&info.shape, size);
                    rows.push(tensor_row(name, info, size));
                    list.push(json!({
                        "name": name,
                        "shard": shard.name(),
                        "kind": "tensor",
                        "shape": info.shape,
                        "dtype": info.dtype.to_string(),
                        "bits_per_weight": info.dtype.bitsize(),
                        "bytes": size,
                    }));
                }
            }
        }
        let broken: Vec<String> = layers.broken.iter().map(ToString::to_string).collect();
        let mut text = Text::default();
        text.table(&rows).line("");
        for (name, total) in [("4-bit tensors", &packed), ("other tensors", &dense)] {
            text.line(format_args!(
                "{name}: {}, {} weights, {}, {:.3} bits per weight",
                total.count,
                total.weights,
                bytes(total.bytes),
                total.bits()
            ));
        }
        text.line(format_args!("total: {} in {} file(s)", bytes(model.data_len()), model.shards.len()));
        let not_understood: Vec<String> = layers.not_understood().collect();
        for line in &not_understood {
            text.line(line);
        }
        for error in &broken {
            text.line(format_args!("broken: {error}"));
        }
        let json = json!({
            "path": self.path.to_string_lossy(),
            "tensors": list,
            "broken": broken,
            "not_understood": not_understood,
            "totals": {
                "nf4": packed.json(),
                "other": dense.json(),
                "bytes": model.data_len(),
                "shards": model.shards.len(),
            },
        });
        Ok(Prepared::report(text, json, broken.is_empty()))
    }
}

#[derive(Debug, Default)]
struct Total {
    count: usize,
    weights: u64,
    bytes: u64,
}

impl Total {
    fn add(&mut self, shape: &[usize], bytes: u64) {
        self.count += 1;
        self.weights += shape.iter().map(|d| *d as u64).product::<u64>();
        self.bytes += bytes;
    }

    /// 0 if there are no weights.
    fn bits(&self) -> f64 {
        if self.weights == 0 { 0.0 } else { self.bytes as f64 * 8.0 / self.weights as f64 }
    }

    fn json(&self) -> Value {
        json!({
            "count": self.count,
            "weights": self.weights,
            "bytes": self.bytes,
            "bits_per_weight": self.bits(),
        })
    }
}

/// Bits per weight with all that the layer has in the file.
fn bits(layer: &Layer) -> f64 {
    let mut total = Total::default();
    total.add(&layer.state.shape, layer.bytes);
    total.bits()
}

fn layer_row(name: &str, layer: &Layer) -> Vec<String> {
    let scales = if layer.state.nested_offset.is_some() { "nested" } else { "plain" };
    vec![
        name.to_owned(),
        shape(&layer.state.shape),
        format!("NF4 ({})", layer.state.dtype.dtype()),
        layer.state.block_size.get().to_string(),
        scales.to_owned(),
        format!("{:.3}", bits(layer)),
        layer.bytes.to_string(),
    ]
}

fn layer_json(name: &str, layer: &Layer, shard: &str) -> Value {
    json!({
        "name": name,
        "shard": shard,
        "kind": "nf4",
        "shape": layer.state.shape,
        "dtype": layer.state.dtype.dtype().to_string(),
        "quant_storage": layer.state.quant_storage.to_string(),
        "block_size": layer.state.block_size.get(),
        "double_quant": layer.state.nested_offset.is_some(),
        "bits_per_weight": bits(layer),
        "bytes": layer.bytes,
    })
}

fn tensor_row(name: &str, info: &TensorInfo, size: u64) -> Vec<String> {
    vec![
        name.to_owned(),
        shape(&info.shape),
        info.dtype.to_string(),
        String::new(),
        String::new(),
        info.dtype.bitsize().to_string(),
        size.to_string(),
    ]
}
