//! What must not change between a run and its continuation.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// What decides the losses of a run, and so must be the same when it goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The hash of all tokens that are trained on and evaluated, and of what is learned of them.
    pub data: String,
    /// The hash of the names, types and shapes of the model's tensors.
    pub model: String,
    /// Layers with a new adapter; none if the run starts from one.
    pub targets: Vec<String>,
    /// Rank of the new adapters.
    pub rank: usize,
    /// Alpha of the new adapters.
    pub alpha: f64,
    /// Whether they have `rsLoRA` scaling.
    pub rslora: bool,
    /// Whether they have the magnitude of `DoRA`.
    #[serde(default)]
    pub dora: bool,
    /// All steps.
    pub steps: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences of a step.
    pub accumulate: usize,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// Steps until it.
    pub warmup: usize,
    /// Weight decay.
    pub weight_decay: f64,
    /// The largest norm of the gradients.
    pub clip: f64,
    /// Steps between evaluations.
    pub evaluate_every: usize,
    /// The arithmetic of the forward.
    pub arithmetic: String,
    /// The start of the random numbers.
    pub seed: u64,
    /// Whether the order of the data is changed.
    pub shuffle: bool,
}

impl Settings {
    /// `Ok` if a run with these settings can go on with others; all but the moments of evaluation must be the same.
    pub(crate) fn check(&self, now: &Self) -> Result<()> {
        let (before, now) = (serde_json::to_value(self)?, serde_json::to_value(now)?);
        for (name, value) in before.as_object().into_iter().flatten().filter(|(name, _)| *name != "evaluate_every") {
            let (now, name) = (&now[name], name.replace('_', "-"));
            ensure!(value == now, "the run was started with {name} = {value}, and now it is {now}");
        }
        Ok(())
    }
}
