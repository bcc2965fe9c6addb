//! Adapters of a weight: the low-rank pair of `LoRA`, the magnitude of `DoRA`, and their gradients.

pub(crate) mod backward;
pub(crate) mod joined;
pub(crate) mod lora;
pub(crate) mod pair;
