//! Checkpoints: the 4-bit layers of `bitsandbytes` and transformers, and the adapters of PEFT, in safetensors files.
//!
//! Everything works on byte slices and needs no `std`, so a device can read a layer from flash. A [`TensorFile`] is a file in
//! memory; anything else that has tensors by name can be a [`TensorSource`]. Files are not trusted: every number in them is
//! checked, a [`CheckpointError`] names the tensor and the numbers that do not fit, and memory is never allocated for more
//! than the file contains. The patterns of PEFT are regular expressions, whose crate needs atomic compare-and-swap, which the
//! smallest processors (Cortex-M0) do not have.
//!
//! ```
//! use nf4::checkpoint::{FloatType, Linear4bit, TensorFile, to_safetensors};
//! use nf4::{BlockSize, Quantized4Bit};
//! let weights: Vec<f32> = (0..32 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let weight = Quantized4Bit::quantize(&weights, 32, 64, BlockSize::B64, true)?;
//!
//! let layer = Linear4bit::new(weight, FloatType::BF16);
//! let file: Vec<u8> = to_safetensors(&layer.tensors("mlp.up_proj"))?;
//!
//! let back = Linear4bit::load(&TensorFile::parse(&file)?, "mlp.up_proj")?;
//! assert_eq!(back.weight().dequantize::<f32>(), layer.weight().dequantize::<f32>());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod conv1d;
mod error;
mod float;
mod foreign;
mod gguf;
mod header;
mod infos;
mod json;
mod linear4bit;
mod low_rank;
mod merged;
mod model_config;
mod names;
mod peft;
mod plan;
mod quant_state;
mod quantization_config;
mod read;
mod reader;
mod shared;
mod skip;
mod source;
mod vocabulary;
mod write;

pub use error::CheckpointError;
pub use float::FloatType;
pub use foreign::{ForeignTensor, foreign_tensors};
pub use gguf::{GgufValue, write_gguf};
pub use header::Header;
pub use linear4bit::Linear4bit;
pub use merged::MergedModel;
pub use model_config::{ModelConfig, Quantization};
pub use peft::{AdaptedTokens, BiasTraining, PeftAdapter, PeftConfig, PeftModule, PeftModuleKind, TargetModules};
pub use plan::{MergeOptions, Note};
pub use quant_state::{QuantState, packed_tensors};
pub use quantization_config::QuantizationConfig;
pub use reader::TensorReader;
pub use safetensors::Dtype;
pub use safetensors::tensor::TensorInfo;
pub use shared::SharedFile;
pub use skip::SkippedModules;
pub use source::{TensorData, TensorFile, TensorMap, TensorSource};
pub use write::{Entry, Layout, to_safetensors, write_safetensors};
