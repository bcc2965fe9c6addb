//! Layers that transformers keeps as `[in, out]` (`Conv1D`), and transposes before they are quantized.

use alloc::format;

use super::model_config::ModelConfig;
use super::names::{last, module_of};

/// The model types with such layers in transformers 5.
pub(super) const TYPES: [&str; 6] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"];

impl ModelConfig {
    /// Whether the weight of this name is that of a `Conv1D`: plain it is `[in, out]`, in 4 bits `[out, in]`.
    #[must_use]
    pub fn is_conv1d(&self, tensor: &str) -> bool {
        has_name(tensor) && self.model_types().any(|model_type| TYPES.contains(&model_type))
    }
}

pub(super) fn has_name(tensor: &str) -> bool {
    const NAMES: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];
    module_of(tensor, "weight").is_some_and(|module| NAMES.contains(&last(module)))
}

/// Whether a weight has the name of one in GPT-2, which other models use for layers that are not transposed.
pub(super) fn may_be(tensor: &str) -> bool {
    has_name(tensor) && format!(".{tensor}").contains(".h.")
}
