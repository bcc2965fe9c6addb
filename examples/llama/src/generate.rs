//! One sequence: its prompt in batches, then token by token.

use crate::cache::Cache;
use crate::error::Error;
use crate::model::{AdapterId, Logits, Model, Part};
use crate::workspace::Workspace;

impl Model {
    /// Continues one sequence with tokens, as many at a time as the workspace takes, and returns the logits of the last
    /// one. An empty `tokens` gives no logits.
    ///
    /// # Errors
    /// The errors of [`Self::forward`]. The cache then has the batches before.
    pub fn extend<'w>(
        &self,
        cache: &mut Cache,
        tokens: &[u32],
        adapter: Option<AdapterId>,
        workspace: &'w mut Workspace,
    ) -> Result<&'w mut [f32], Error> {
        let whole = tokens.len().saturating_sub(1) / workspace.tokens().max(1) * workspace.tokens();
        let (first, last) = tokens.split_at(whole);
        for tokens in first.chunks(workspace.tokens().max(1)) {
            self.forward(&mut [Part { cache, tokens, adapter }], Logits::None, workspace)?;
        }
        self.forward(&mut [Part { cache, tokens: last, adapter }], Logits::Last, workspace)
    }
}
