// The first definition of a link counts: these are for rustdoc, those in the file for the web.
//! [`Absmax`]: Absmax
//! [`Kernels`]: Kernels
//! [`Nf4Matrix`]: Nf4Matrix
//! [`spec`]: spec
//!
#![doc = include_str!("../README.md")]
#![no_std]

mod absmax;
mod activations;
mod double_quant;
mod error;
mod float;
mod format;
mod gradients;
mod isa;
mod kernels;
mod matrix;
pub mod spec;

pub use absmax::{Absmax, NestedAbsmax};
pub use activations::{Activations, Activations8x8};
pub use double_quant::DYNAMIC_MAP;
pub use error::ShapeError;
pub use float::Float;
pub use format::{BlockSize, CODEBOOK, NESTED_BLOCK, THRESHOLDS, packed_len};
pub use gradients::Gradients;
pub use half::{bf16, f16};
pub use isa::Isa;
pub use kernels::Kernels;
pub use matrix::Nf4Matrix;
