//! The layers against plain f64 arithmetic, on every instruction set of this machine.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

#[path = "../support/generator.rs"]
mod generator;

mod batch;
mod dora;
mod errors;
mod forward;
mod memory;
mod merge;
mod multi;
mod peft;
mod shared;
mod tensor;
mod training;
mod truth;

use generator::Generator;
use nf4::{BlockSize, Kernels, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit};

/// Every kind of kernels of this machine, named in the output of the test.
fn all_kernels() -> Vec<Kernels> {
    let kernels: Vec<_> = Kernels::available().collect();
    println!("instruction sets: {}", kernels.iter().map(|k| k.isa().name()).collect::<Vec<_>>().join(", "));
    kernels
}

/// `len` values, about normal with deviation `sigma`.
fn normal(len: usize, sigma: f32, seed: u64) -> Vec<f32> {
    let mut generator = Generator(seed);
    (0..len).map(|_| generator.normal() * sigma).collect()
}

/// A layer with a normal weight and a normal adapter, `B` not zero.
fn layer(d_out: usize, d_in: usize, rank: usize, block: BlockSize, double_quant: bool) -> QLoRALayer {
    let base = Quantized4Bit::quantize(&normal(d_out * d_in, 0.02, 1), d_out, d_in, block, double_quant).unwrap();
    QLoRALayer::from_parts(base, adapter(d_out, d_in, rank)).unwrap()
}

fn adapter(d_out: usize, d_in: usize, rank: usize) -> LoRAAdapter {
    let (a, b) = (normal(rank * d_in, 0.05, 2), normal(d_out * rank, 0.05, 3));
    LoRAAdapter::from_parts(a, b, d_out, d_in, rank, 16.0, LoRAScaling::RsLoRA).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
