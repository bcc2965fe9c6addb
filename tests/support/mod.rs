//! Shared by the tests: reference data on disk, bit-exact comparison, and reading of quantized layers.
#![allow(dead_code, unused_imports, unused_macros, reason = "every test program uses a part of this")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

mod compare;
mod generator;
mod quantized;
mod tensors;
mod tree;

pub(crate) use compare::Checker;
pub(crate) use generator::Generator;
pub(crate) use quantized::{NestedScales, Quantized, Scales, quantize, quantize_absmax};
pub(crate) use tensors::{Element, Tensor, Tensors, with_float};
pub(crate) use tree::{Case, Tree, check_kind, kernels};
