//! The forward pass.

use alloc::format;
use alloc::string::ToString;

use super::{Logits, Model, Part};
use crate::config::Config;
use crate::error::Error;
use crate::math::rms_norm;
use crate::workspace::{Rows, Workspace};

impl Model {
    /// Continues sequences with their next tokens, and returns logits, `[tokens, vocabulary]`, of the tokens that
    /// `logits` says, part by part.
    ///
    /// The bits of a token's logits depend on its sequence and adapter alone: neither on what else is in the batch, nor
    /// on how the sequence was cut into calls, nor on the machine.
    ///
    /// # Errors
    /// [`Error::Token`]; [`Error::Room`] if the tokens do not fit into the workspace or a cache; [`Error::ForeignCache`].
    /// The caches are as before then.
    pub fn forward<'w>(
        &self,
        parts: &mut [Part<'_>],
        logits: Logits,
        workspace: &'w mut Workspace,
    ) -> Result<&'w mut [f32], Error> {
        let rows: usize = parts.iter().map(|part| part.tokens.len()).sum();
        let wanted = match logits {
            Logits::None => 0,
            Logits::All => rows,
            Logits::Last => parts.iter().filter(|part| !part.tokens.is_empty()).count(),
        };
        for part in parts.iter() {
            part.cache.check(&self.config, part.tokens.len())?;
        }
        let mut w = workspace.rows(self, rows, wanted)?;
        self.embed(parts, &mut w)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let fail = |error| Error::Layer { module: format!("model.layers.{layer}"), error };
            block.forward(self, layer, parts, &mut w).map_err(fail)?;
        }
        for part in parts.iter_mut() {
            part.cache.advance(part.tokens.len());
        }
        self.norm_wanted(parts, logits, &mut w);
        let x = &w.normed[..wanted * self.config.hidden];
        let head = match &self.head {
            None => self.embedding.product(self.kernels, &self.pool, x, &mut w.scratch.tile, w.logits),
            Some(head) => {
                // No adapter has a part for the head.
                let adapters = &mut w.adapters[..wanted];
                adapters.fill(None);
                head.forward(x, adapters, w.scratch, w.logits)
            }
        };
        head.map_err(|error| Error::Layer { module: "lm_head".to_string(), error })?;
        Ok(w.logits)
    }

    /// The stream, angles and adapter of each token.
    fn embed(&self, parts: &[Part<'_>], w: &mut Rows<'_>) -> Result<(), Error> {
        let Config { hidden, vocabulary, ref rope, .. } = self.config;
        let tokens =
            parts.iter().flat_map(|part| part.tokens.iter().enumerate().map(move |(n, token)| (part, n, token)));
        for (row, (part, n, &token)) in tokens.enumerate() {
            let place = usize::try_from(token).ok().filter(|t| *t < vocabulary);
            let place = place.ok_or(Error::Token { token, vocabulary })?;
            self.embedding.row(place, &mut w.stream[row * hidden..][..hidden]);
            let pairs = rope.pairs();
            let (cos, sin) = (&mut w.cos[row * pairs..][..pairs], &mut w.sin[row * pairs..][..pairs]);
            rope.angles(part.cache.len() + n, cos, sin);
            w.adapters[row] = part.adapter.map(|id| id.0);
        }
        Ok(())
    }

    /// The normed rows whose logits are wanted, one after the other.
    fn norm_wanted(&self, parts: &[Part<'_>], logits: Logits, w: &mut Rows<'_>) {
        let Config { hidden, norm_eps, .. } = self.config;
        let mut row = 0;
        let mut out = w.normed.chunks_exact_mut(hidden);
        for part in parts {
            let first = match logits {
                Logits::None => part.tokens.len(),
                Logits::Last => part.tokens.len().saturating_sub(1),
                Logits::All => 0,
            };
            for (n, out) in (first..part.tokens.len()).zip(&mut out) {
                rms_norm(&w.stream[(row + n) * hidden..][..hidden], &self.norm, norm_eps, out);
            }
            row += part.tokens.len();
        }
    }
}
