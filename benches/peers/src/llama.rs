//! llama.cpp: its formats as they are in files, and repacked for eight rows at a time, as it loads them by default.

use anyhow::Result;

use crate::foreign::{self, Format, Ggml};
use crate::measure::{Entry, Peer, Problem};
use crate::run::locked_version;

struct Llama {
    ggml: Ggml,
    format: Format,
    cols: usize,
    /// Whether this one also times conversions: to and from what files hold.
    converts: bool,
    converted: Vec<u8>,
    dequantized: Vec<f32>,
}

impl Peer for Llama {
    fn product(&mut self, matrix: usize, batch: usize) {
        self.ggml.compute(matrix, batch);
    }

    fn output(&self, batch: usize) -> Vec<f32> {
        self.ggml.read_output(batch)
    }

    fn quantize(&mut self, weights: &[f32]) -> bool {
        if self.converts {
            self.format.quantize(weights, self.cols, &mut self.converted);
        }
        self.converts
    }

    fn dequantize(&mut self) {
        self.format.dequantize(&self.converted, &mut self.dequantized);
    }

    fn rest(&mut self) {
        self.ggml.pause();
    }
}

pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let mut entries = Vec::new();
    let version = format!("(llama-cpp-sys-2 {}, ggml {})", locked_version("llama-cpp-sys-2"), foreign::ggml_version());
    for (format, name) in [(Format::Iq4Nl, "IQ4_NL"), (Format::Q4_0, "Q4_0"), (Format::Q4K, "Q4_K")] {
        let mut quantized = format.buffer(problem.weights.len());
        format.quantize(&problem.weights, problem.cols, &mut quantized);
        let mut weights = vec![0.0; problem.weights.len()];
        format.dequantize(&quantized, &mut weights);
        for (repack, suffix) in [(false, ""), (true, ", repacked")] {
            let name = format!("llama.cpp {name}{suffix}");
            let (bytes, len) = (quantized.len(), problem.converted().len());
            let entry = Ggml::new(problem, format, &quantized, problem.copies(bytes), repack).and_then(|ggml| {
                let (converted, dequantized) = (format.buffer(len), vec![0.0; len]);
                let peer = Llama { ggml, format, cols: problem.cols, converts: !repack, converted, dequantized };
                Entry::new("llama.cpp", &version, &name, bytes, problem, Box::new(peer)).check(problem, &weights)
            });
            entries.push(entry.map_err(|e| e.context(name)));
        }
    }
    entries
}
