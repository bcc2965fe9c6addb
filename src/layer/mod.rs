//! Linear layers on a frozen weight: forward, training and merge.

pub(crate) mod forward;
pub(crate) mod linear;
pub(crate) mod lora;
pub(crate) mod memory;
mod methods;
pub(crate) mod multi;
pub(crate) mod qlora;
pub(crate) mod scratch;
