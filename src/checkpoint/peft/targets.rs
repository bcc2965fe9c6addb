//! What a configuration says of parameters and tokens, by the names of their modules.

use alloc::borrow::ToOwned;

use super::super::error::CheckpointError;
use super::super::names::Ends;
use super::adapter::tensor_name;
use super::config::{PeftConfig, TargetModules};

/// The lists of a configuration, for many lookups.
pub(super) struct Targets<'a> {
    /// Modules of which parameters other than the weight are targeted.
    owners: Ends<'a, ()>,
    /// If parameters are targeted whatever module they are of: the modules that have pairs of their own.
    modules: Option<Ends<'a, ()>>,
    /// The tokens, and how many entries come before.
    tokens: Ends<'a, (usize, &'a [usize])>,
}

impl<'a> Targets<'a> {
    pub(super) fn new(config: &'a PeftConfig) -> Self {
        let owners = config.target_parameters().iter().filter_map(|target| match target.rsplit_once('.') {
            // The weight of a layer as a parameter has the pair of the layer.
            Some((_, "weight")) | None => None,
            Some((owner, _)) => Some((owner, ())),
        });
        let modules = match config.target_modules() {
            Some(TargetModules::List(names)) if config.target_parameters().iter().any(|name| !name.contains('.')) => {
                Some(Ends::new(names.iter().map(|name| (name.as_str(), ()))))
            }
            _ => None,
        };
        let tokens = config.trainable_tokens().iter().enumerate();
        let tokens = tokens.map(|(at, (name, indices))| (name.as_str(), (at, indices.as_slice())));
        Self { owners: Ends::new(owners), modules, tokens: Ends::new(tokens) }
    }

    /// Whether the pair of this module is that of one of its parameters and not of its weight.
    pub(super) fn has_parameter_of(&self, module: &str) -> bool {
        let is_of_any = self.modules.as_ref().is_some_and(|modules| modules.of(module).next().is_none());
        is_of_any || self.owners.of(module).next().is_some()
    }

    /// The tokens that were trained in a module: those of the first entry that names it.
    pub(super) fn tokens(&self, module: &str) -> Result<&'a [usize], CheckpointError> {
        let found = self.tokens.of(module).chain(self.tokens.of("")).min_by_key(|(at, _)| *at);
        found.map(|(_, indices)| *indices).ok_or_else(|| {
            let tensor = tensor_name(module, "token_adapter.trainable_tokens_delta");
            let reason = "rows of tokens, but trainable_token_indices names none for this module".to_owned();
            CheckpointError::Unexpected { tensor, reason }
        })
    }
}
