//! PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Facts are those of PEFT 0.21: the fields of `LoraConfig` (`tuners/lora/config.py`), `get_pattern_key`
//! (`utils/other.py`), the names of tensors (`utils/save_and_load.py`).

mod adapter;
mod config;
mod pattern;
mod save;

pub use adapter::{PeftAdapter, PeftModule};
pub use config::{BiasTraining, PeftConfig, TargetModules};

/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";
