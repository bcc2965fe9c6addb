//! The low-rank pair of `LoRA`, its `DoRA` magnitude and its gradients.

pub(crate) mod backward;
pub(crate) mod dora;
pub(crate) mod lora;
