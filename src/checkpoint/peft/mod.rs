//! PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Facts are those of PEFT 0.21: the fields of `LoraConfig` (`tuners/lora/config.py`), `get_pattern_key`
//! (`utils/other.py`), the names of tensors (`utils/save_and_load.py`), what the layers of `tuners/lora/layer.py` and
//! `tuners/trainable_tokens/layer.py` add when they are merged.

mod adapter;
mod config;
mod config_file;
mod key;
mod load;
mod pattern;
mod save;
mod targets;

pub(super) use adapter::Factors;
pub use adapter::{AdaptedTokens, PeftAdapter, PeftModule, PeftModuleKind};
pub use config::{BiasTraining, PeftConfig, TargetModules};

/// The name of the file of a configuration.
const CONFIG: &str = "adapter_config.json";

/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";
