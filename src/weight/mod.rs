//! Quantized weights, the inputs that they are multiplied with, and the frozen weight below an adapter.

pub(crate) mod absmax;
pub(crate) mod base;
pub(crate) mod gradients;
pub(crate) mod inputs;
pub(crate) mod quantized;
pub(crate) mod store;
