//! Checkpoints: files of `bitsandbytes`, PEFT and transformers, what is written again, and files that are wrong.
//!
//! The reference files are those in `tests/data/reference`, or in the tree that `NF4_REFERENCE` names.
#![cfg(feature = "safetensors")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

#[path = "../support/mod.rs"]
mod support;

mod layers;
