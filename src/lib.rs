//! placeholder
#![no_std]
#![forbid(unsafe_code)]
pub use nf4_kernels::*;
