//! What the fuzz targets share: inputs made from any bytes, and the truth in f64.
//!
//! An input is a header of plain integers, little endian, and then bytes without a structure. So a seed is written down
//! field by field (`examples/seeds.rs`), and a byte that the fuzzer changes changes one thing.

pub mod files;
pub mod folder;
mod input;
pub mod many;
mod matrix;
pub mod model;

#[path = "../../tests/support/generator.rs"]
mod generator;
#[allow(unreachable_pub, dead_code, reason = "it is for tests")]
#[path = "../../tests/layer/truth.rs"]
mod layer_truth;

pub use input::{Bytes, Floats, Shape};
pub use matrix::{Matrix, Product, Scales, check_dense, is_tame};

use nf4::{Activations, BlockSize, Float, Kernels};

/// Every kind of kernels of this machine but the portable ones, which the results of the others are compared with.
pub fn others() -> impl Iterator<Item = Kernels> {
    Kernels::available().filter(|k| *k != Kernels::scalar())
}

/// The bits of floats, for exact comparison.
pub fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// Buffers for quantized activations, filled with what no result consists of.
#[derive(Debug)]
pub struct ActivationBuffers {
    values: Vec<i16>,
    scales: Vec<f32>,
    cols: usize,
    block_size: BlockSize,
}

impl ActivationBuffers {
    /// For a batch of vectors of `cols` inputs.
    pub fn new(batch: usize, cols: usize, block_size: BlockSize) -> Self {
        let values = vec![0x5555; batch * Activations::values_len(cols, block_size)];
        let scales = vec![-1.0; batch * Activations::scales_len(cols, block_size)];
        Self { values, scales, cols, block_size }
    }

    /// Quantizes `inputs`, `[batch, cols]`.
    pub fn quantize<'a>(&'a mut self, kernels: Kernels, inputs: &'a [f32]) -> Activations<'a> {
        let Self { values, scales, cols, block_size } = self;
        kernels.quantize_activations_batch(inputs, *cols, *block_size, values, scales).expect("the lengths fit")
    }
}
