//! `nf4`: a layer without adapters, which is the product alone, and a pure read of its bytes.

use core::hint::black_box;

use anyhow::Result;
use nf4::{Arithmetic, BlockSize, MultiAdapterLayer, Quantized4Bit, Scratch};

use crate::measure::{BATCHES, Entry, Peer, Problem};

struct Layers {
    layers: Vec<MultiAdapterLayer>,
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
        layer.forward_batch_into(inputs, &mut self.scratch, outputs).expect("the shapes fit");
    }

    fn output(&self, batch: usize) -> Vec<f32> {
        self.outputs[..batch * self.layers[0].d_out()].to_vec()
    }
}

/// The 16x4 product, with plain and nested absmax, and the f32 product.
pub fn entries(problem: &Problem) -> Vec<Result<Entry>> {
    let arithmetics = [
        ("nf4 16x4", Arithmetic::SixteenByFour, false),
        ("nf4 16x4, nested absmax", Arithmetic::SixteenByFour, true),
        ("nf4 f32", Arithmetic::F32, false),
    ];
    let entry = |(name, arithmetic, nested)| {
        let Problem { rows, cols, .. } = *problem;
        let weight = Quantized4Bit::quantize(&problem.weights, rows, cols, BlockSize::B64, nested)?;
        let (bytes, weights) = (weight.memory_bytes(), weight.dequantize::<f32>());
        let layer = MultiAdapterLayer::new(weight).with_arithmetic(arithmetic);
        let largest = BATCHES[2];
        let peer = Layers {
            inputs: problem.inputs(largest).to_vec(),
            cols,
            scratch: layer.scratch(largest),
            outputs: vec![0.0; largest * rows],
            layers: vec![layer; problem.copies(bytes)],
        };
        Entry::new("nf4", "this version", name, bytes, problem, Box::new(peer)).check(problem, &weights)
    };
    arithmetics.into_iter().map(entry).collect()
}

/// Reads bytes, and does nothing else.
struct Read {
    matrices: Vec<Vec<u8>>,
    threads: usize,
}

impl Peer for Read {
    fn product(&mut self, matrix: usize, _: usize) {
        let bytes = &self.matrices[matrix];
        black_box(if self.threads == 1 {
            xor(bytes)
        } else {
            let (a, b) = bytes.split_at(bytes.len() / 256 * 128);
            rayon::join(|| black_box(xor(a)), || xor(b)).1
        });
    }

    fn output(&self, _: usize) -> Vec<f32> {
        Vec::new()
    }
}

fn xor(bytes: &[u8]) -> [u64; 16] {
    bytes.as_chunks::<128>().0.iter().fold([0; 16], |mut sums, chunk| {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
        sums
    })
}

/// The limit: a pure read of 4.5 bits a weight.
pub fn read(problem: &Problem) -> Entry {
    let bytes = problem.rows * problem.cols / 16 * 9;
    let matrices = (0..problem.copies(bytes)).map(|i| vec![i as u8 + 1; bytes]).collect();
    let peer = Read { matrices, threads: problem.threads };
    let mut entry = Entry::new("read", "", "a pure read of 4.5 bits a weight", bytes, problem, Box::new(peer));
    entry.batches = &BATCHES[..1];
    entry
}
