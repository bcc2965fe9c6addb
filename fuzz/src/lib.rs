//! What the fuzz targets share: inputs made from any bytes, and the truth in f64.
//!
//! An input is a header of plain integers, little endian, and then bytes without a structure. So a seed is written down
//! field by field (`seeds/main.rs`), and a byte that the fuzzer changes changes one thing.

pub mod files;
pub mod folder;
mod input;
pub mod layer;
pub mod many;
mod matrix;
pub mod products;

#[path = "../../tests/support/generator.rs"]
mod generator;
#[allow(unreachable_pub, dead_code, reason = "it is for tests")]
#[path = "../../tests/layer/truth.rs"]
mod layer_truth;

pub use input::{Bytes, Floats, Poison, Shape};
pub use matrix::{Matrix, Product, Scales, check_dense, is_tame};

use nf4::{Float, Kernels};

/// Every kind of kernels of this machine but the portable ones, which the results of the others are compared with.
pub fn others() -> impl Iterator<Item = Kernels> {
    Kernels::available().filter(|k| *k != Kernels::scalar())
}

/// The bits of floats, for exact comparison.
pub fn bits<T: Float>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}
