//! Checkpoints: files of `bitsandbytes`, PEFT and transformers, what is written again, and files that are wrong.
//!
//! The reference files are those in `tests/data/reference`, or in the tree that `NF4_REFERENCE` names.
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

#[path = "../support/mod.rs"]
mod support;

mod adapters;
mod field;
mod hostile;
mod kinds;
mod layers;
mod merged;
mod round_trip;
mod shared;
mod time;

use nf4::checkpoint::{FloatType, TensorData};

/// A tensor of the values `step`, `2 step`, `3 step`, ...
fn tensor(name: &str, float: FloatType, shape: &[usize], step: f32) -> (String, TensorData<'static>) {
    let values: Vec<f32> = (1..=shape.iter().product::<usize>()).map(|i| i as f32 * step).collect();
    let mut bytes = Vec::new();
    float.extend_bytes(&values, &mut bytes);
    (name.to_owned(), TensorData::new(name, float.dtype(), shape.to_vec(), bytes).unwrap())
}
