//! NF4 and `QLoRA` linear layers for [candle](candle_core).
//!
//! * [`Nf4Linear`]: a frozen 4-bit weight of `bitsandbytes`, multiplied directly on the packed bytes.
//! * [`QLoRALinear`]: the same with a `LoRA` or `DoRA` adapter, whose `A`, `B` and magnitude are variables of a
//!   [`candle_nn::VarMap`].
//!
//! Both are [`candle_nn::Module`]s and one operation for candle's autograd, which so reaches the variables and the input.
//! The products and gradients are those of [`nf4::QLoRALayer`], bit for bit: no weight is ever dequantized whole, and what a
//! step keeps for its backward is the input and a copy of the adapter.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, VarMap};
//! use nf4::{BlockSize, LoRAAdapter, LoRAScaling, Quantized4Bit};
//! use nf4_candle::QLoRALinear;
//!
//! let (d_out, d_in, rank) = (16, 128, 4);
//! let weight: Vec<f32> = (0..d_out * d_in).map(|i| (i as f32 * 0.37).sin()).collect();
//! let weight = Quantized4Bit::quantize(&weight, d_out, d_in, BlockSize::B64, true)?;
//! let adapter = LoRAAdapter::new(d_out, d_in, rank, 8.0, LoRAScaling::Standard, 0)?;
//!
//! let vars = VarMap::new();
//! let layer = QLoRALinear::new("model.layers.0.self_attn.q_proj", weight, None, &adapter, &vars)?;
//! let x = Tensor::ones((2, 3, d_in), DType::F32, &Device::Cpu)?;
//! let loss = layer.forward(&x)?.sqr()?.sum_all()?;
//! let gradients = loss.backward()?;
//! assert_eq!(vars.all_vars().iter().filter_map(|var| gradients.get(var)).count(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Files
//!
//! [`nf4::checkpoint::Linear4bit::load`] reads the weight of a layer from a safetensors file of `bitsandbytes`; from a
//! [`nf4::checkpoint::SharedFile`], such as a mapped one, it copies nothing. [`load_peft`] and [`save_peft`] read and write
//! the two files of a PEFT adapter; [`peft_adapter`] collects what the layers of a model have learned.
//!
//! # Types and shapes
//!
//! Inputs are `[..., d_in]` with any number of dimensions in front, in f32, f16 or bf16, with any strides; outputs are `[...,
//! d_out]` in the type of the input. The variables are f32, as PEFT trains them. Everything else is an error of candle:
//! shapes that do not fit, other types, other devices than the CPU. A value that is NaN or infinite gives what
//! [`nf4::QLoRALayer::forward`] says for inputs; in a variable it is an error.
//!
//! Layers hold no lock, so one can run in several threads at once; large products use the threads of the current `rayon`
//! pool, as candle's own do, and no bit depends on their number.

mod frozen;
mod many;
mod peft;
mod qlora;
mod values;

pub use frozen::Nf4Linear;
pub use many::function;
pub use peft::{load_peft, peft_adapter, save_peft};
pub use qlora::QLoRALinear;
