//! llama.cpp: its formats as they are in files, and repacked for eight rows at a time, as it loads them by default.

use anyhow::Result;

use crate::foreign::{Format, Ggml};
use crate::measure::{Entry, Peer, Problem};

impl Peer for Ggml {
    fn product(&mut self, matrix: usize, batch: usize) {
        self.compute(matrix, batch);
    }

    fn output(&self, batch: usize) -> Vec<f32> {
        self.read_output(batch)
    }

    fn rest(&mut self) {
        self.pause();
    }
}

pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let mut entries = Vec::new();
    for (format, name) in [(Format::Iq4Nl, "IQ4_NL"), (Format::Q4_0, "Q4_0"), (Format::Q4K, "Q4_K")] {
        let quantized = format.quantize(&problem.weights, problem.rows, problem.cols);
        let weights = format.dequantize(&quantized, problem.weights.len());
        for (repack, suffix) in [(false, ""), (true, ", repacked")] {
            let name = format!("llama.cpp {name}{suffix}");
            let (bytes, version) = (quantized.len(), "llama-cpp-sys-2 0.1.161");
            let peer = Ggml::new(problem, format, &quantized, problem.copies(bytes), repack);
            let entry = peer.and_then(|peer| {
                Entry::new("llama.cpp", version, &name, bytes, problem, Box::new(peer)).check(problem, &weights)
            });
            entries.push(entry.map_err(|e| e.context(name)));
        }
    }
    entries
}
