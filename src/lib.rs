//! 4-bit `NormalFloat` (NF4) weights and `QLoRA` layers on CPUs: reads the files of `bitsandbytes` and PEFT, multiplies
//! directly on the packed bytes, and returns the same bits on every machine.
//!
//! ```
//! # #[cfg(feature = "alloc")] {
//! use nf4::{QLoRALayer, Tensor};
//!
//! let (d_out, d_in, rank, alpha) = (32, 128, 8, 16.0);
//! let weight: Vec<f32> = (0..d_out * d_in).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
//!
//! // The base weight is quantized to NF4 with one scale per 64 weights; A is random, B is zero.
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
//! # Where to start
//!
//! | you have | you want |
//! |---|---|
//! | a bitsandbytes checkpoint, a PEFT adapter | `checkpoint::Linear4bit`, `checkpoint::PeftAdapter` (feature `safetensors`) |
//! | f32, f16 or bf16 weights | [`Quantized4Bit::quantize`] |
//! | one adapter to run or to train | [`QLoRALayer`] and [`optim`] |
//! | many adapters on one base | [`MultiAdapterLayer`] |
//! | an adapter to merge into a model | `checkpoint::MergedModel`; [`QLoRALayer::merge_rows_into`] for one layer |
//! | your own buffers and no heap | [`Kernels`] and [`Nf4Matrix`] |
//!
//! The crate has five levels; each builds only on those above it in this list:
//!
//! * **bytes**: [`Nf4Matrix`], a checked view of packed codes and their [`Absmax`];
//! * **operations**: [`Kernels`], the functions of one instruction set, which all return the same bits;
//! * **weights**: [`Quantized4Bit`], a matrix whose bytes are owned, static or shared ([`Store`]), and the [`Inputs`]
//!   that it is multiplied with;
//! * **adapters**: [`LoRAAdapter`], the low-rank pair of `LoRA` and the magnitude of `DoRA`;
//! * **layers**: [`QLoRALayer`], a quantized weight and an adapter; [`MultiAdapterLayer`], many adapters on one weight;
//!   and [`LoRALayer`], on a dense weight.
//!
//! The first two come from the crate `nf4-kernels`, which never allocates.
//!
//! # For engines
//!
//! * Weights can stay where they are: in a mapped file (`checkpoint::SharedFile`), in flash, or in a buffer that several
//!   layers share ([`Store`]).
//! * Inputs are quantized once for all layers that take them ([`QLoRALayer::quantize_inputs`]).
//! * Forwards into buffers ([`QLoRALayer::forward_into`]) do not allocate, and take f32, f16 or bf16.
//! * Threads come from any pool ([`Threads`]).
//! * Each vector of a batch may use its own adapter ([`Adapters`]).
//!
//! # The format
//!
//! A weight matrix `[rows, cols]`, row-major, is one flat sequence of elements. Each has a 4-bit code, an index into
//! [`CODEBOOK`]; two codes share a byte, the first in the high nibble. Blocks of 32 to 4096 consecutive elements
//! ([`BlockSize`]) have one scale, their absmax, so a weight is `CODEBOOK[code] * absmax`. Blocks run over the flat
//! sequence: they straddle rows if `cols` is not a multiple of the block size, and the last one may be partial. With double
//! quantization the absmax are 8-bit codes themselves ([`NestedAbsmax`]).
//!
//! This is the format of bitsandbytes 0.50, and [`Kernels::quantize`] writes the same bytes as it does. Checkpoints and
//! adapters are tested with PEFT 0.21 and transformers 5.23.
//!
//! # Errors
//!
//! Functions that can fail return a `Result`; for programs in which a wrong shape is a bug, some have a twin that panics
//! instead, such as `forward` for `try_forward`. Kernels return [`ShapeError`], layers return [`Error`], and readers and
//! writers of files return `checkpoint::CheckpointError`. Every error carries its numbers: what was expected, what was found,
//! and where. NaN and infinity are errors in weights, scales and adapters; in inputs they make outputs NaN, as each
//! operation documents.
//!
//! The `# Errors` sections of layers leave out what all of them share:
//!
//! * [`Error::OutOfMemory`], if a function that allocates finds no memory. Functions that end in `_into` do not allocate,
//!   unless they say so.
//! * [`Error::Mismatch`], [`Error::MatrixLength`] or [`Error::Shape`], if the adapter, or one of its tensors, was replaced
//!   by one that does not fit (`*layer.lora_a_mut() = ..`).
//! * [`Error::Shape`], if the owner of [`SharedBytes`] no longer returns the bytes that it did.
//!
//! # Platforms
//!
//! On x86-64 the instruction set is chosen at run time, also without `std`: AVX-512 with VNNI, AVX-VNNI or AVX2. aarch64
//! always has NEON; whether the CPU has `dotprod` and `i8mm` too, which the 8x8 product uses, is found out at run time on
//! Linux, Android and Apple's systems, also without `std`, and elsewhere it depends on the target features that the crate is
//! compiled with. On other targets the instruction set is chosen when the crate is compiled: WebAssembly needs
//! `-C target-feature=+simd128`; Cortex-M4 and M7 use the DSP extension, and a Cortex-M33 needs
//! `-C target-cpu=cortex-m33 --cfg nf4_dsp`. Everything else runs portable code.
//!
//! # Features
//!
//! * `alloc` (default): everything that owns its data. Without it, this crate is `nf4-kernels` alone.
//! * `safetensors`: the module `checkpoint`. It reads byte slices and does not need `std`.
//! * `rayon`: large products, conversions and merges run on the current `rayon` pool by default. No bit depends on the
//!   number of threads.
//!
//! The crate is `no_std` and contains no unsafe code.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

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
#[cfg(all(feature = "alloc", target_has_atomic = "ptr"))]
pub use weight::store::SharedBytes;
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
    parallel::Threads,
    tensor::Tensor,
    weight::{
        absmax::AbsmaxBuf,
        inputs::{Arithmetic, Inputs, InputsBuf},
        quantized::Quantized4Bit,
        store::Store,
    },
};

/// The examples of the README are tests.
#[cfg(all(doctest, feature = "safetensors"))]
#[doc = include_str!("../README.md")]
struct Readme;
