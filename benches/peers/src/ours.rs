//! `nf4`: a layer without adapters, which is the product alone, and a pure read of its bytes.

use core::hint::black_box;
use std::process::Command;

use anyhow::Result;
use nf4::{Adapters, Arithmetic, BlockSize, Kernels, MultiAdapterLayer, Quantized4Bit, Scratch};

use crate::measure::{BATCHES, Entry, Peer, Problem};
use crate::run::locked_version;

struct Layers {
    layers: Vec<MultiAdapterLayer>,
    /// Of the scales.
    double_quant: bool,
    /// Whether this one also times conversions, which do not depend on the arithmetic.
    converts: bool,
    converted: Option<Quantized4Bit>,
    dequantized: Vec<f32>,
    inputs: Vec<f32>,
    cols: usize,
    scratch: Scratch,
    outputs: Vec<f32>,
}

impl Peer for Layers {
    fn product(&mut self, matrix: usize, batch: usize) {
        let layer = &self.layers[matrix];
        let outputs = &mut self.outputs[..batch * layer.d_out()];
        let inputs = black_box(&self.inputs[..batch * self.cols]);
        layer.forward_into(inputs, Adapters::Active, &mut self.scratch, outputs).expect("the shapes fit");
    }

    fn output(&self, batch: usize) -> Vec<f32> {
        self.outputs[..batch * self.layers[0].d_out()].to_vec()
    }

    fn quantize(&mut self, weights: &[f32]) -> bool {
        if self.converts {
            let rows = weights.len() / self.cols;
            let quantized = Quantized4Bit::quantize(weights, rows, self.cols, BlockSize::B64, self.double_quant);
            self.converted = Some(quantized.expect("the shape fits and the weights are finite"));
        }
        self.converts
    }

    fn dequantize(&mut self) {
        let quantized = self.converted.as_ref().expect("something was quantized");
        quantized.dequantize_rows(0..quantized.rows(), black_box(&mut self.dequantized)).expect("the shapes fit");
    }
}

/// The commit, as there may be many of one version.
fn version() -> String {
    let describe = ["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"];
    let commit = Command::new("git").args(describe).output().ok().filter(|o| o.status.success());
    let commit = commit.and_then(|o| String::from_utf8(o.stdout).ok());
    format!("{} ({})", locked_version("nf4"), commit.as_deref().map_or("commit unknown", str::trim))
}

/// Those that the CPU has, or AVX2 if the others are compiled for no more.
fn kernels() -> Kernels {
    let held = cfg!(target_feature = "avx2") && !cfg!(target_feature = "avx512f");
    let avx2 = || Kernels::available().find(|kernels| kernels.isa().name() == "avx2");
    held.then(avx2).flatten().unwrap_or_else(Kernels::detect)
}

/// The 16x4 and the 8x8 product, with plain and nested absmax, and the f32 product.
pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let arithmetics = [
        ("nf4 16x4", Arithmetic::SixteenByFour, false),
        ("nf4 16x4, nested absmax", Arithmetic::SixteenByFour, true),
        ("nf4 8x8", Arithmetic::EightByEight, false),
        ("nf4 8x8, nested absmax", Arithmetic::EightByEight, true),
        ("nf4 f32", Arithmetic::F32, false),
    ];
    let entry = |(name, arithmetic, nested)| {
        let Problem { rows, cols, .. } = *problem;
        let weight = Quantized4Bit::quantize(&problem.weights, rows, cols, BlockSize::B64, nested)?;
        let (bytes, weights) = (weight.memory_bytes(), weight.dequantize::<f32>());
        let layer = MultiAdapterLayer::new(weight).with_arithmetic(arithmetic).with_kernels(kernels());
        let largest = BATCHES[2];
        let peer = Layers {
            double_quant: nested,
            converts: arithmetic == Arithmetic::SixteenByFour,
            converted: None,
            dequantized: vec![0.0; problem.converted().len()],
            inputs: problem.inputs(largest).to_vec(),
            cols,
            scratch: layer.scratch(largest),
            outputs: vec![0.0; largest * rows],
            layers: vec![layer; problem.copies(bytes)],
        };
        Entry::new("nf4", &version(), name, bytes, problem, Box::new(peer)).check(problem, &weights)
    };
    arithmetics.into_iter().map(entry).collect()
}

struct Read {
    matrices: Vec<Vec<u8>>,
    threads: usize,
}

impl Peer for Read {
    fn product(&mut self, matrix: usize, _: usize) {
        yardstick::read(black_box(&self.matrices[matrix]), self.threads);
    }

    fn output(&self, _: usize) -> Vec<f32> {
        Vec::new()
    }
}

/// The limit: a pure read of 4.5 bits per weight.
pub fn read(problem: &Problem) -> Vec<Result<Entry>> {
    let bytes = problem.rows * problem.cols / 16 * 9;
    let matrices = (0..problem.copies(bytes)).map(|i| vec![i as u8 + 1; bytes]).collect();
    let peer = Read { matrices, threads: problem.threads };
    let mut entry = Entry::new("read", "", "a pure read of 4.5 bits per weight", bytes, problem, Box::new(peer));
    entry.batches = &BATCHES[..1];
    vec![Ok(entry)]
}
