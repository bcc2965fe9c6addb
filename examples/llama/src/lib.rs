//! Language models of the Llama family on NF4 weights.
//!
//! A [`Model`] is read from a checkpoint that transformers and `bitsandbytes` quantized; its adapters are switched while
//! it runs; and its logits are the same bits on every machine, for any number of threads, and however a text is cut
//! into calls. The model itself needs only `alloc`; files, text and the program need the feature `std` (default).
#![no_std]

extern crate alloc;
#[cfg(feature = "text")]
extern crate std;

mod attention;
mod cache;
mod config;
#[cfg(feature = "text")]
mod conversation;
#[cfg(feature = "std")]
mod directory;
mod error;
mod generate;
mod linear;
#[cfg(feature = "std")]
mod map;
mod math;
mod matrix;
mod model;
#[cfg(feature = "std")]
pub mod program;
mod rope;
mod sample;
mod shards;
#[cfg(feature = "text")]
mod text;
mod threads;
mod weights;
mod workspace;

pub use cache::{Cache, CacheType};
pub use config::{Config, Family};
#[cfg(feature = "text")]
pub use conversation::{Conversation, Engine, Prompt};
#[cfg(feature = "std")]
pub use directory::{Directory, read_adapter};
pub use error::Error;
pub use math::{exp, hash};
pub use model::{AdapterId, Logits, Model, Options, Part};
pub use rope::Rope;
pub use sample::{Sampler, Sampling, argmax};
pub use shards::{Shards, shard_names};
#[cfg(feature = "text")]
pub use text::{Message, Stream, Text, TextFiles};
pub use workspace::Workspace;
