//! Weights in another format: they stay with their description, or the merge is refused.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;

use super::super::error::CheckpointError;
use super::super::float::FloatType;
use super::super::model_config::{ModelConfig, Quantization};
use super::super::names::last;
use super::super::skip::SkippedModules;
use super::super::vocabulary::is_embedding;
use super::{Builder, MergeOptions, Note, Origin, Planned};

impl Builder<'_> {
    /// Whether tensors in another format stay as they are; an error if they would lose their description, or if
    /// something is to be done to them.
    pub(super) fn check_foreign(&mut self, options: &MergeOptions<'_>) -> Result<bool, CheckpointError> {
        let described = self.config.as_ref().map_or(Quantization::None, ModelConfig::quantization);
        let Quantization::Other { method, skipped } = described else {
            self.check_described()?;
            return match self.foreign.first() {
                None => Ok(false),
                Some(tensor) => Err(tensor.error("cannot be dequantized, and config.json does not say how to load it")),
            };
        };
        let refused = |tensor: &str, reason: &str| {
            Err(CheckpointError::Foreign {
                tensor: tensor.to_owned(),
                format: method.clone(),
                reason: reason.to_owned(),
            })
        };
        if let Some(tensor) = self.plan.values().find_map(|planned| match &planned.origin {
            Origin::Packed(tensor) => Some(tensor),
            _ => None,
        }) {
            return refused(
                tensor,
                "config.json describes this quantization, but this tensor is in 4 bits of bitsandbytes",
            );
        }
        if !self.is_adapted {
            return refused("quantization_config", "these weights cannot be dequantized");
        }
        if options.dtype.is_some_and(|dtype| dtype != self.main) {
            return refused(
                "quantization_config",
                "the weights keep their types, so that what is packed can still be loaded",
            );
        }
        let mut touched = core::mem::take(&mut self.touched);
        touched.retain(|module| !is_embedding(module));
        if let Some(module) = SkippedModules::new(skipped)?.first_other(&touched)? {
            return refused(
                module,
                "the model is quantized so, and config.json does not name this module as one that is not",
            );
        }
        let count = self.foreign.len();
        self.notes.push(Note::KeptQuantization { format: method, tensors: count });
        Ok(true)
    }

    /// `Ok` unless a weight has the shape that only packed ones have, in the type that packed bytes are said to have, and
    /// nothing describes it.
    fn check_described(&self) -> Result<(), CheckpointError> {
        let storage = self.config.as_ref().and_then(ModelConfig::quant_storage);
        let is_packed = |(name, planned): &(&String, &Planned)| {
            planned.origin == Origin::Base((*name).clone())
                && last(name) == "weight"
                && Some(planned.info.dtype) == storage.map(FloatType::dtype)
                && matches!(*planned.info.shape, [rows, 1] if rows > 1)
        };
        match self.plan.iter().find(is_packed) {
            None => Ok(()),
            Some((name, planned)) => Err(CheckpointError::Foreign {
                tensor: name.clone(),
                format: "4 bits of bitsandbytes without a description".to_owned(),
                reason: format!("{} {:?}, and there is no {name}.quant_state", planned.info.dtype, planned.info.shape),
            }),
        }
    }
}
