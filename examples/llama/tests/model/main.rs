//! The model on tiny checkpoints: against transformers, the same bits everywhere, and errors.

#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests end at the first surprise, and have std")]

mod allocation;
mod errors;
mod reference;
mod same_bits;
mod tiny;
