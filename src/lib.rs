//! 4-bit `NormalFloat` (NF4) weights and `QLoRA` layers on CPUs, on the bytes of `bitsandbytes`.
//!
//! ```
//! # #[cfg(feature = "alloc")] {
//! use nf4::{QLoRALayer, Tensor};
//!
//! let (d_out, d_in, rank, alpha) = (32, 128, 8, 16.0);
//! let weight: Vec<f32> = (0..d_out * d_in).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
//!
//! // The base weight becomes NF4 with one scale for each 64 weights; A is random, B is zero.
//! let mut layer = QLoRALayer::new(Tensor::from_vec(weight, false), d_out, d_in, rank, alpha);
//! layer.lora_b_mut().data_mut().fill(0.001);
//!
//! let x = Tensor::from_vec(vec![1.0; d_in], false);
//! let y = layer.forward(&x); // W x + scale * B (A x), directly on the packed bytes
//! assert_eq!(y.len(), d_out);
//! assert_eq!(layer.base_weight_quantized().bits_per_weight(), 4.5);
//! # }
//! ```
//!
//! Three levels, each knowing only the one below:
//!
//! * **bytes**: [`Nf4Matrix`], a checked view of packed codes and their [`Absmax`];
//! * **operations**: [`Kernels`], the table of kernels of one instruction set, all with the same bits as result;
//! * **layers**: [`QLoRALayer`], a [`Quantized4Bit`] base and a [`LoRAAdapter`]; [`MultiAdapterLayer`], many adapters
//!   on one base; and [`LoRALayer`], on a dense base.
//!
//! The first two come from `nf4-kernels`, which never allocates. What owns its data needs the feature `alloc`
//! (default); without it this crate is only those two. The crate is `no_std` and has no unsafe code.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "alloc")]
extern crate alloc;

#[cfg(feature = "alloc")]
mod adapter;
#[cfg(feature = "alloc")]
mod buffer;
#[cfg(feature = "safetensors")]
pub mod checkpoint;
#[cfg(feature = "alloc")]
mod error;
#[cfg(feature = "alloc")]
mod layer;
#[cfg(feature = "alloc")]
pub mod optim;
#[cfg(feature = "alloc")]
mod parallel;
#[cfg(feature = "alloc")]
mod round;
#[cfg(feature = "alloc")]
mod tensor;
#[cfg(feature = "alloc")]
mod weight;

pub use nf4_kernels::*;

#[cfg(feature = "rayon")]
pub use parallel::Rayon;
#[cfg(feature = "alloc")]
pub use {
    adapter::{
        backward::BackwardScratch,
        lora::{DEFAULT_SEED, LoRAAdapter, LoRAScaling},
    },
    error::Error,
    layer::{
        lora::LoRALayer,
        memory::MemoryStats,
        multi::{AdapterId, Adapters, MultiAdapterLayer},
        qlora::{QLoRALayer, RequantizationStats},
        scratch::Scratch,
    },
    tensor::Tensor,
    weight::{
        absmax::AbsmaxBuf,
        inputs::{Arithmetic, Inputs, InputsBuf},
        quantized::Quantized4Bit,
        store::Store,
    },
};
#[cfg(all(feature = "alloc", target_has_atomic = "ptr"))]
pub use {parallel::Threads, weight::store::SharedBytes};

/// The examples of the README are tests.
#[cfg(all(doctest, feature = "alloc"))]
#[doc = include_str!("../README.md")]
struct Readme;
