//! Quantized weights, and the frozen weight below an adapter.

pub(crate) mod base;
pub(crate) mod dense;
pub(crate) mod quantized;
