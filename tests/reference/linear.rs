//! Kinds `linear4bit` and `checkpoint`: layers as `bitsandbytes` and transformers save them.

use crate::support::{Case, Checker, Quantized, Scales, Tensors, quantize};
use crate::{layers, products, second_level};

/// One `Linear4bit`, with its original weight and outputs for several batches.
pub(crate) fn linear4bit(c: &mut Checker, case: &Case) {
    let (model, io) = (case.tensors_in("model.safetensors"), case.tensors_in("io.safetensors"));
    let layer = Quantized::from_state_dict(&model, "weight");
    c.holds("shape", (layer.rows, layer.cols) == (case.number("out"), case.number("in")), || {
        format!("{} x {}", layer.rows, layer.cols)
    });
    c.holds("blocksize", layer.block_size == case.block_size(), || format!("{:?}", layer.block_size));
    for (name, tensor) in io.iter().filter(|(name, _)| name.starts_with("weight_dequantized")) {
        c.dequantized(name, &layer.matrix(), tensor);
    }

    let (packed, absmax) = quantize(c.kernels, io.get("weight_original"), layer.block_size);
    c.equal("weight", &packed, &layer.packed);
    match &layer.scales {
        Scales::Plain(reference) => c.equal("weight.absmax", &absmax, reference),
        Scales::Nested(reference) => second_level::quantized(c, &absmax, reference),
    }

    let bias = model.find("bias").map(|b| b.to_f32());
    for n in case.info["batches"].as_array().unwrap() {
        let (x, y64) = (io.get(&format!("x_{n}")), io.get(&format!("y64_{n}")));
        products::check(c, &format!("y64_{n}"), &layer, x, bias.as_deref(), y64);
        layers::linear(c, &format!("y64_{n}"), &layer, x, bias.as_deref(), y64);
    }
}

/// A whole model: every quantized layer by its prefix.
pub(crate) fn checkpoint(c: &mut Checker, case: &Case) {
    let (model, io) = (case.tensors_in("model.safetensors"), case.tensors_in("io.safetensors"));
    for name in case.info["layers"].as_array().unwrap() {
        let name = name.as_str().unwrap();
        let layer = Quantized::from_state_dict(&model, &format!("{name}.weight"));
        let weight = format!("{name}.weight_dequantized_f32");
        c.dequantized(&weight, &layer.matrix(), io.get(&weight));
        let bias = bias_of(&model, name);
        let (x, y64) = (io.get(&format!("{name}.x")), format!("{name}.y64"));
        products::check(c, &y64, &layer, x, bias.as_deref(), io.get(&y64));
        layers::linear(c, &y64, &layer, x, bias.as_deref(), io.get(&y64));
    }
}

fn bias_of(model: &Tensors, layer: &str) -> Option<Vec<f32>> {
    model.find(&format!("{layer}.bias")).map(|b| b.to_f32())
}
