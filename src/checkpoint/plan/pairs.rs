//! The pair of a module's weight.

use alloc::borrow::ToOwned;
use alloc::format;

use super::super::error::CheckpointError;
use super::super::names::join;
use super::super::peft::{PeftAdapter, PeftModule, PeftModuleKind};
use super::{Builder, Change, Origin, Pair};

impl Builder<'_> {
    /// Adds the pair of a module to its weight, and the bias of `B` to its bias.
    pub(super) fn add_pair(
        &mut self,
        adapter: &PeftAdapter,
        module: &str,
        pair: &PeftModule,
        name: &str,
        tensor: &str,
    ) -> Result<(), CheckpointError> {
        pair.adapter().pair().map_err(|error| CheckpointError::Layer { layer: module.to_owned(), error })?;
        let [d_out, d_in] = [pair.adapter().d_out(), pair.adapter().d_in()];
        if !self.plan.contains_key(tensor) {
            return self.add_to_fused(module, pair, name);
        }
        self.check_is_float(tensor)?;
        let conv1d = self.config.as_ref().map(|_| self.is_conv1d(tensor));
        let planned = self.planned_mut(tensor)?;
        let shape = &planned.info.shape;
        let mut matrix = planned.matrix;
        let transposed = match pair.kind() {
            PeftModuleKind::Embedding => true,
            PeftModuleKind::Convolution(kernel) => {
                if shape.get(2..).is_none_or(|inner| inner != kernel) {
                    let (expected, got) = (kernel.clone(), shape.get(2..).unwrap_or_default().to_vec());
                    return Err(CheckpointError::Shape { tensor: format!("the kernel of {tensor}"), expected, got });
                }
                matrix = [shape[0], shape[1..].iter().product()];
                false
            }
            PeftModuleKind::Linear => match conv1d {
                // A 4-bit one is `[out, in]` until it is transposed, after everything else.
                Some(true) => !planned.transposed,
                // PEFT sets the flag by the class of the module, and what has no `Conv1D` is a `Linear`.
                Some(false) => matrix != [d_out, d_in] && adapter.config().fan_in_fan_out(),
                None => adapter.config().fan_in_fan_out() && !matches!(planned.origin, Origin::Packed(_)),
            },
        };
        let base = if transposed { [matrix[1], matrix[0]] } else { matrix };
        if base != [d_out, d_in] {
            let error = crate::Error::Mismatch { base, adapter: [d_out, d_in] };
            return Err(CheckpointError::Layer { layer: name.to_owned(), error });
        }
        planned.matrix = matrix;
        let module = module.to_owned();
        planned
            .changes
            .push(Change::LowRank { rows: 0..matrix[0], pair: Pair::Module { module: module.clone(), transposed } });
        if pair.lora_bias().is_some() {
            let bias = join(name, "bias");
            // As in PEFT, the base must have one.
            if !self.plan.contains_key(&bias) {
                return Err(CheckpointError::Missing { tensor: bias });
            }
            self.check_is_float(&bias)?;
            let planned = self.planned_mut(&bias)?;
            if planned.info.shape != [d_out] {
                let (expected, got) = (alloc::vec![d_out], planned.info.shape.clone());
                return Err(CheckpointError::Shape { tensor: bias, expected, got });
            }
            planned.matrix = [d_out, 1];
            planned.changes.push(Change::LowRank { rows: 0..d_out, pair: Pair::Bias { module } });
        }
        self.touched.push(name.to_owned());
        Ok(())
    }
}
