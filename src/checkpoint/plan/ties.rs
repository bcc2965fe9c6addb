//! Ties between the input embedding and the output head: what is trained of a pair belongs to one side alone unless
//! `ensure_weight_tying` is set, or unless rows of tokens were trained; so the other side gets the weight of the base as
//! one of its own.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::names::{join, module_of};
use super::super::peft::PeftAdapter;
use super::super::read::{bytes_in, len_of};
use super::embeddings::Embedding;
use super::matching::Names;
use super::{Builder, Change, Note, Origin, Pair, Planned};

impl Builder<'_> {
    /// What becomes of a head and an embedding that are one weight in the base.
    pub(super) fn settle_ties(
        &mut self,
        adapter: &PeftAdapter,
        names: &Names<'_>,
        embedding: &Embedding,
        base: Planned,
    ) -> Result<(), CheckpointError> {
        let stated = self.config.as_ref().and_then(|config| config.is_tied());
        let head = self.head(names);
        let in_base = self.source.info(&head).is_some();
        // What the file has twice is tied if it is the same, as in transformers 5; whether untied values may differ without
        // a word in the configuration depends on the class.
        let tied = stated.unwrap_or(true) && self.config.is_some();
        if !tied || !self.generates() || (in_base && !self.is_twice(&head, &embedding.tensor)?) {
            return Ok(());
        }
        let Some(now) = self.plan.get(&embedding.tensor).cloned() else { return Ok(()) };
        let base_changed = matches!(base.origin, Origin::Replaced(_));
        let input_changed = !now.changes.is_empty() || is_saved(adapter, &base);
        let only_tokens = now.changes.iter().all(|change| matches!(change, Change::Tokens { .. })) && !base_changed;
        let follows = adapter.config().ensures_weight_tying() || (only_tokens && !now.changes.is_empty());
        let own_head = self
            .plan
            .get(&head)
            .cloned()
            .filter(|planned| planned.origin != Origin::Base(head.clone()) || !planned.changes.is_empty());
        match own_head {
            Some(planned) if self.is_same(adapter, &planned, &now, follows) => {
                // Both sides are one still.
                self.plan.remove(&head);
                self.notes.retain(|note| match note {
                    Note::Added { tensor, .. } | Note::Untied { head: tensor, .. } => *tensor != head,
                    _ => true,
                });
                self.edits.untied = false;
            }
            Some(planned) => {
                self.share_base(&planned, &embedding.tensor, &now);
                if !self.edits.untied {
                    self.edits.untied = true;
                    let (head, embedding) = (head.clone(), embedding.tensor.clone());
                    self.notes.push(Note::Untied { head, embedding });
                }
            }
            None if input_changed && !follows => {
                let original = match base.origin {
                    // The base of what was trained as a whole: the adapter may have it, else the model does.
                    Origin::Replaced(_) => self.base_of(adapter, names, embedding)?,
                    _ => Planned { changes: Vec::new(), ..base },
                };
                if original.info.shape.first() != now.info.shape.first() {
                    let reason = format!(
                        "it was trained with {} rows, and {head}, which shares its weight in the base, has {}; the adapter \
                         has no weight for that",
                        now.info.shape[0], original.info.shape[0]
                    );
                    return Err(CheckpointError::Unexpected { tensor: embedding.tensor.clone(), reason });
                }
                self.plan.remove(&head);
                self.untie(&head, &embedding.tensor, original);
            }
            None => {
                // The head follows; a copy in the file would be the old weight.
                if in_base && input_changed {
                    self.plan.remove(&head);
                    self.notes.push(Note::Removed { tensor: head.clone() });
                }
            }
        }
        if self.edits.untied {
            self.untie_others(&head, embedding);
        }
        Ok(())
    }

    /// Gives the embedding the weight to which the head's pair is added, which they shared: the adapter may have it with more
    /// rows than the base.
    fn share_base(&mut self, head: &Planned, embedding: &str, now: &Planned) {
        let is_base = matches!(now.origin, Origin::Base(_)) && matches!(head.origin, Origin::AdapterBase(_));
        if !is_base || head.changes.is_empty() {
            return;
        }
        let (from, to) = (now.info.shape.clone(), head.info.shape.clone());
        let dtype = now.info.dtype;
        let mut shared = Planned { changes: now.changes.clone(), ..head.clone() };
        shared.info.dtype = dtype;
        self.plan.insert(embedding.to_owned(), shared);
        if from != to {
            self.notes.push(Note::Resized { tensor: embedding.to_owned(), from, to });
        }
    }

    /// Whether two tensors of the base have the same bytes.
    fn is_twice(&self, a: &str, b: &str) -> Result<bool, CheckpointError> {
        const CHUNK: usize = 1 << 20;
        let (Some(first), Some(second)) = (self.source.info(a), self.source.info(b)) else { return Ok(false) };
        if first.dtype != second.dtype || first.shape != second.shape {
            return Ok(false);
        }
        let len = len_of(self.source, a)?;
        for start in (0..len).step_by(CHUNK) {
            let range = start..len.min(start + CHUNK);
            if bytes_in(self.source, a, range.clone())? != bytes_in(self.source, b, range)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The weight of the embedding before it was trained as a whole.
    fn base_of(
        &self,
        adapter: &PeftAdapter,
        names: &Names<'_>,
        embedding: &Embedding,
    ) -> Result<Planned, CheckpointError> {
        let name = |tensor: &str| {
            let (module, part) = tensor.rsplit_once('.').unwrap_or(("", tensor));
            join(names.get(module).map_or(module, String::as_str), part)
        };
        if let Some((tensor, data)) = adapter.bases().iter().find(|(tensor, _)| name(tensor) == embedding.tensor) {
            let mut info = self.plan[&embedding.tensor].info.clone();
            info.shape = data.shape().to_vec();
            return super::planned(&embedding.tensor, Origin::AdapterBase(tensor.clone()), &info);
        }
        let mut base = Builder::new(self.source, self.config.clone())?;
        base.plan.remove(&embedding.tensor).ok_or_else(|| CheckpointError::Missing { tensor: embedding.tensor.clone() })
    }

    /// The other weights that transformers no longer ties once `tie_word_embeddings` is false: they get what they had.
    fn untie_others(&mut self, head: &str, embedding: &Embedding) {
        if let Some(model_type) = self.tied_by_class() {
            self.edits.untied = false;
            self.notes.push(Note::TiedByClass { model_type });
            return;
        }
        // The bias of a head of BERT is that of the layer around it.
        if let Some(outer) = module_of(head, "decoder.weight").map(|outer| join(outer, "bias")) {
            let own = head.trim_end_matches("weight").to_owned() + "bias";
            self.copy(&outer, own);
        }
        // Encoder and decoder share the embedding.
        if let Some(model) = embedding.module.strip_suffix("shared") {
            for part in ["encoder", "decoder"] {
                self.copy(&embedding.tensor, format!("{model}{part}.embed_tokens.weight"));
            }
        }
    }

    fn copy(&mut self, from: &str, to: String) {
        if self.plan.contains_key(&to) {
            return;
        }
        if let Some(planned) = self.plan.get(from).cloned() {
            self.notes.push(Note::Added { tensor: to.clone(), shape: planned.info.shape.clone() });
            self.plan.insert(to, planned);
        }
    }

    /// The model type, if its class ties weights whatever the configuration says: in `configuration_t5.py` the field
    /// means that outputs are not scaled.
    fn tied_by_class(&self) -> Option<String> {
        const TYPES: [&str; 3] = ["t5", "longt5", "pop2piano"];
        let mut types = self.config.iter().flat_map(|config| config.model_types());
        types.find(|model_type| TYPES.contains(model_type)).map(str::to_owned)
    }

    /// Whether the head's weight and the embedding's are the same values.
    fn is_same(&self, adapter: &PeftAdapter, head: &Planned, embedding: &Planned, follows: bool) -> bool {
        let whole = |planned: &Planned| match &planned.origin {
            Origin::Replaced(tensor) => adapter.replaced().get(tensor),
            Origin::AdapterBase(tensor) => adapter.bases().get(tensor),
            _ => None,
        };
        let both_saved = is_saved(adapter, head) && is_saved(adapter, embedding);
        let same_origin = head.origin == embedding.origin
            || match (whole(head), whole(embedding)) {
                // PEFT writes both where both were named, though they be the same.
                (Some(_), Some(_)) if !follows && both_saved => false,
                (Some(a), Some(b)) => a.dtype() == b.dtype() && a.shape() == b.shape() && a.bytes() == b.bytes(),
                (Some(_), None) => follows && matches!(head.origin, Origin::AdapterBase(_)),
                _ => false,
            };
        let same_changes = match (&*head.changes, &*embedding.changes) {
            ([], []) => true,
            // A head that follows is not trained.
            ([], _) => follows,
            (
                [Change::LowRank { pair: Pair::Module { module: a, .. }, .. }],
                [Change::LowRank { pair: Pair::Module { module: b, .. }, .. }],
            ) => is_transposed_pair(adapter, a, b),
            ([Change::Tokens { module: a }], [Change::Tokens { module: b }]) => {
                adapter.tokens().get(a) == adapter.tokens().get(b)
            }
            _ => false,
        };
        same_origin && same_changes
    }
}

/// Whether a tensor was to be trained as a whole.
fn is_saved(adapter: &PeftAdapter, planned: &Planned) -> bool {
    matches!(&planned.origin, Origin::Replaced(tensor) if adapter.saved_from(tensor).is_some())
}

/// Whether the pair of a head is that of an embedding, transposed, as PEFT ties them: `A` of one is `B` of the other.
fn is_transposed_pair(adapter: &PeftAdapter, head: &str, embedding: &str) -> bool {
    let (Some(head), Some(embedding)) = (adapter.module(head), adapter.module(embedding)) else { return false };
    let (h, e) = (head.adapter(), embedding.adapter());
    let is_transposed = |a: &[f32], b: &[f32], rows: usize, cols: usize| {
        a.len() == b.len()
            && (0..rows).all(|r| (0..cols).all(|c| a[r * cols + c].to_bits() == b[c * rows + r].to_bits()))
    };
    [h.rank(), h.d_in(), h.d_out()] == [e.rank(), e.d_out(), e.d_in()]
        && h.scale().to_bits() == e.scale().to_bits()
        && is_transposed(h.a().data(), e.b().data(), h.rank(), h.d_in())
        && is_transposed(h.b().data(), e.a().data(), h.d_out(), h.rank())
}
