//! Adapters of a model.

use alloc::format;
use alloc::string::ToString;

use nf4::checkpoint::{PeftAdapter, PeftModule};

use super::{AdapterId, Model};
use crate::error::Error;
use crate::linear::Linear;

impl Model {
    /// Adds an adapter of PEFT. It is used by the sequences that ask for it.
    ///
    /// # Errors
    /// [`Error::Adapter`] if there is one of this name; [`Error::Unsupported`] if it is for a module that the model
    /// does not have, or replaces tensors of the model; [`Error::Layer`] if it does not fit.
    pub fn add_adapter(&mut self, name: &str, adapter: &PeftAdapter) -> Result<AdapterId, Error> {
        if self.adapters.iter().any(|a| a == name) {
            return Err(Error::Adapter { name: name.to_string(), duplicate: true });
        }
        let unsupported = |what: &str, reason: &str| {
            Err(Error::Unsupported { what: format!("adapter {name}: {what}"), reason: reason.to_string() })
        };
        if let Some(tensor) = adapter.replaced().keys().next() {
            return unsupported(tensor, "an adapter that replaces tensors of the model cannot be switched");
        }
        for (module, part) in adapter.modules() {
            let Some(linear) = self.linear_mut(module) else {
                return unsupported(module, "the model has no linear layer of this name");
            };
            linear.check(part.adapter()).map_err(Error::layer(module))?;
            if part.lora_bias().is_some() {
                return unsupported(module, "an adapter with a bias (lora_bias) cannot be switched");
            }
            if linear.is_dense() && part.adapter().magnitude().is_some() {
                return unsupported(module, "DoRA on a layer that is not quantized");
            }
        }
        for (index, block) in self.blocks.iter_mut().enumerate() {
            for (part, linear) in block.linears_mut() {
                let module = format!("model.layers.{index}.{part}");
                let part = adapter.module(&module).map(PeftModule::adapter);
                linear.add(name, part).map_err(Error::layer(&module))?;
            }
        }
        self.adapters.push(name.to_string());
        Ok(AdapterId(self.adapters.len() - 1))
    }

    /// The layer of this name.
    fn linear_mut(&mut self, module: &str) -> Option<&mut Linear> {
        let (index, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let block = self.blocks.get_mut(index.parse::<usize>().ok()?)?;
        block.linears_mut().into_iter().find(|(name, _)| *name == part).map(|(_, linear)| linear)
    }
}
