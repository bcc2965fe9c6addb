//! `entrenar`: the layer of the same name, with an adapter of rank 1, the smallest, whose `B` is zero. One vector at
//! a time.

use anyhow::Result;
use entrenar::Tensor;
use entrenar::lora::QLoRALayer;
use entrenar::quant::{Quantized4Bit, dequantize_4bit, quantize_4bit};

use crate::measure::{BATCHES, Entry, Peer, Problem};
use crate::run::locked_version;

struct Layers {
    layers: Vec<QLoRALayer>,
    input: Tensor,
    output: Option<Tensor>,
    converted: Option<Quantized4Bit>,
    dequantized: Vec<f32>,
}

impl Peer for Layers {
    fn product(&mut self, matrix: usize, _: usize) {
        self.output = Some(self.layers[matrix].forward(&self.input));
    }

    fn output(&self, _: usize) -> Vec<f32> {
        self.output.as_ref().expect("there was a product").data().to_vec()
    }

    fn quantize(&mut self, weights: &[f32]) -> bool {
        self.converted = Some(quantize_4bit(weights));
        true
    }

    fn dequantize(&mut self) {
        self.dequantized = dequantize_4bit(self.converted.as_ref().expect("something was quantized"));
    }
}

pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let Problem { rows, cols, .. } = *problem;
    let layer = || QLoRALayer::new(Tensor::from_vec(problem.weights.clone(), false), rows, cols, 1, 1.0);
    let first = layer();
    let (bytes, weights) = (first.base_weight_quantized().memory_bytes(), first.merge_to_f32());
    // It writes the whole f32 matrix in each product, so one copy more or less in memory does not matter.
    let (copies, input) = (2, Tensor::from_vec(problem.inputs(1).to_vec(), false));
    let peer = Layers { layers: vec![first, layer()], input, output: None, converted: None, dequantized: Vec::new() };
    let name = "entrenar QLoRALayer (int4)";
    let version = locked_version("entrenar");
    let mut entry = Entry::new("entrenar", &version, name, bytes, problem, Box::new(peer));
    (entry.batches, entry.copies) = (&BATCHES[..1], copies);
    vec![entry.check(problem, &weights)]
}
