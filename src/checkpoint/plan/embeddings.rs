//! Input and output embeddings: weights that are one, heads that are new, vocabularies that grew.
//!
//! The merged model computes what PEFT's model with the adapter computes. There, what is trained of a tied pair belongs to
//! one side alone unless `ensure_weight_tying` is set, or unless rows of tokens were trained; so the other side gets the
//! weight of the base as one of its own.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::names::{join, last, module_of};
use super::super::peft::PeftAdapter;
use super::super::read::{bytes_in, len_of};
use super::adapt::Names;
use super::{Builder, Change, Note, Origin, Pair, Planned};

/// The input embedding of a model.
#[derive(Debug, Clone)]
pub(super) struct Embedding {
    pub(super) module: String,
    pub(super) tensor: String,
}

/// Names of input embeddings; where a model has several, an earlier one is that which others are tied to.
const EMBEDDINGS: [&str; 9] = [
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "word_embedding",
    "tok_embeddings",
    "embed_in",
    "tokens_embed",
    "embeddings",
];

/// Whether a module has the name of an output head over the vocabulary (`_tied_weights_keys` in transformers).
pub(super) fn is_head(module: &str) -> bool {
    const HEADS: [&str; 8] = [
        "lm_head",
        "embed_out",
        "proj_out",
        "generator_lm_head",
        "vocab_projector",
        "output_projection",
        "lm_loss",
        "decoder",
    ];
    let name = last(module);
    HEADS.contains(&name) && (name != "decoder" || module.contains("predictions.") || module.contains("lm_head."))
}

/// Endings of the names of classes with an output head over the vocabulary.
const GENERATING: [&str; 6] =
    ["ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "DoubleHeadsModel"];

impl Builder<'_> {
    /// The input embedding, if there is one that can be told.
    pub(super) fn embedding(&self, adapter: &PeftAdapter) -> Option<Embedding> {
        let rows = self.config.as_ref().and_then(|config| config.vocabulary());
        let with_tokens: BTreeSet<&str> = adapter.tokens().keys().map(|name| last(name)).collect();
        let touched = |module: &str| {
            with_tokens.contains(last(module))
                || adapter.module(module).is_some()
                || adapter.replaced().contains_key(&join(module, "weight"))
        };
        let rank = |module: &str, planned: &Planned| {
            let name = EMBEDDINGS.iter().position(|name| *name == last(module))?;
            let has_rows = rows.is_none_or(|rows| planned.info.shape.first() == Some(&rows));
            (planned.info.shape.len() == 2).then_some((!has_rows, !touched(module), name, module.len()))
        };
        let found = self.plan.iter().filter_map(|(tensor, planned)| {
            let module = module_of(tensor, "weight")?;
            Some((rank(module, planned)?, module, tensor))
        });
        let (_, module, tensor) = found.min_by_key(|(rank, ..)| *rank)?;
        Some(Embedding { module: module.to_owned(), tensor: tensor.clone() })
    }

    pub(super) fn is_embedding_name(&self, module: &str) -> bool {
        EMBEDDINGS.contains(&last(module))
    }

    /// Whether a head that the base has no weight of has that of the input embedding.
    pub(super) fn is_tied(&self, head: &str) -> bool {
        let stated = self.config.as_ref().and_then(|config| config.is_tied());
        stated.unwrap_or_else(|| !self.plan.contains_key(head))
    }

    /// Gives a head a weight of its own, that of the embedding in the base.
    pub(super) fn untie(&mut self, head: &str, embedding: &str, base: Planned) {
        self.notes.push(Note::Untied { head: head.to_owned(), embedding: embedding.to_owned() });
        self.notes.push(Note::Added { tensor: head.to_owned(), shape: base.info.shape.clone() });
        self.plan.insert(head.to_owned(), base);
        self.edits.untied = true;
    }

    /// What follows from changed embeddings and heads: ties, configuration, the number of words.
    pub(super) fn settle_embeddings(
        &mut self,
        adapter: &PeftAdapter,
        names: &Names<'_>,
        embedding: Option<(&Embedding, Option<Planned>)>,
    ) -> Result<(), CheckpointError> {
        let new_head = self.settle_task(adapter);
        if let Some((embedding, Some(base))) = embedding
            && !new_head
        {
            self.settle_ties(adapter, names, embedding, base)?;
        }
        self.settle_vocabulary()
    }

    fn settle_ties(
        &mut self,
        adapter: &PeftAdapter,
        names: &Names<'_>,
        embedding: &Embedding,
        base: Planned,
    ) -> Result<(), CheckpointError> {
        let stated = self.config.as_ref().and_then(|config| config.is_tied());
        let head = self.head(names);
        let in_base = self.source.info(&head).is_some();
        let tied = stated.unwrap_or(!in_base) && self.config.is_some();
        // As in transformers 5: what the file has twice and differently is not tied.
        if !tied || !self.generates() || (in_base && !self.is_twice(&head, &embedding.tensor)?) {
            return Ok(());
        }
        let Some(now) = self.plan.get(&embedding.tensor).cloned() else { return Ok(()) };
        let base_changed = matches!(base.origin, Origin::Replaced(_));
        let is_saved = is_saved(adapter, &embedding.module);
        let input_changed = !now.changes.is_empty() || (base_changed && is_saved);
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
                self.notes.retain(|note| !matches!(note, Note::Added { tensor, .. } | Note::Untied { head: tensor, .. } if *tensor == head));
                self.edits.untied = false;
            }
            Some(_) => {
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
        let is_saved = |planned: &Planned| match &planned.origin {
            Origin::Replaced(tensor) => module_of(tensor, "weight").is_some_and(|module| is_saved(adapter, module)),
            _ => false,
        };
        let both_saved = is_saved(head) && is_saved(embedding);
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

    /// The weight of the output head over the vocabulary, by the names of the model, or those of its class.
    fn head(&self, names: &Names<'_>) -> String {
        let by_adapter = names.values().find(|module| is_head(module)).map(|module| join(module, "weight"));
        let in_base = || {
            let heads = self.plan.keys().filter(|tensor| module_of(tensor, "weight").is_some_and(is_head));
            heads.min_by_key(|tensor| tensor.len()).cloned()
        };
        by_adapter.or_else(in_base).unwrap_or_else(|| self.head_of_class())
    }

    fn head_of_class(&self) -> String {
        const HEADS: [(&str, &[&str]); 6] = [
            (
                "cls.predictions.decoder",
                &[
                    "bert",
                    "big_bird",
                    "ernie",
                    "megatron-bert",
                    "layoutlm",
                    "mobilebert",
                    "rembert",
                    "roformer",
                    "tapas",
                    "visual_bert",
                    "nezha",
                    "fnet",
                    "deberta",
                    "deberta-v2",
                ],
            ),
            ("predictions.decoder", &["albert"]),
            (
                "lm_head.decoder",
                &[
                    "roberta",
                    "xlm-roberta",
                    "xlm-roberta-xl",
                    "camembert",
                    "esm",
                    "ibert",
                    "longformer",
                    "luke",
                    "mpnet",
                    "data2vec-text",
                    "roberta-prelayernorm",
                    "xmod",
                    "yoso",
                ],
            ),
            ("proj_out", &["whisper", "speech_to_text", "speech_to_text_2", "moonshine"]),
            ("generator_lm_head", &["electra", "convbert"]),
            ("vocab_projector", &["distilbert"]),
        ];
        let model_type = self.config.as_ref().and_then(|config| config.fields().get("model_type")?.as_str());
        let known = HEADS.iter().find(|(_, types)| model_type.is_some_and(|model_type| types.contains(&model_type)));
        join(known.map_or("lm_head", |(head, _)| head), "weight")
    }

    /// Whether the model has an output head over the vocabulary.
    fn generates(&self) -> bool {
        let architecture = self.config.as_ref().and_then(|config| config.architecture());
        architecture.is_none_or(|architecture| GENERATING.iter().any(|end| architecture.ends_with(end)))
    }

    /// A head for a task in place of that over the vocabulary. Whether there is one.
    fn settle_task(&mut self, adapter: &PeftAdapter) -> bool {
        const TASKS: [(&str, &str); 3] = [
            ("SEQ_CLS", "ForSequenceClassification"),
            ("TOKEN_CLS", "ForTokenClassification"),
            ("QUESTION_ANS", "ForQuestionAnswering"),
        ];
        const NAMES: [&str; 4] = ["score", "classifier", "qa_outputs", "out_proj"];
        let new: Vec<String> = self
            .plan
            .iter()
            .filter(|(tensor, planned)| {
                matches!(planned.origin, Origin::Replaced(_))
                    && module_of(tensor, "weight").is_some_and(|module| NAMES.contains(&last(module)))
            })
            .map(|(tensor, _)| tensor.clone())
            .collect();
        let Some(head) = new.last() else { return false };
        let labels = self.plan[head].info.shape.first().copied();
        let was_there = self.source.info(head).is_some();
        let resized = was_there && self.source.info(head).and_then(|info| info.shape.first().copied()) != labels;
        if was_there && !resized {
            return false;
        }
        let from = self.config.as_ref().and_then(|config| config.architecture()).map(str::to_owned);
        let task = adapter.config().fields().get("task_type").and_then(|task| task.as_str());
        let ending = TASKS.iter().find(|(name, _)| task == Some(name)).map(|(_, ending)| *ending);
        let to = match (&from, ending) {
            (Some(from), Some(ending)) if from.ends_with(ending) => Some(from.clone()),
            (Some(from), Some(ending)) => {
                let endings = GENERATING.iter().copied().chain(["Model"]).chain(TASKS.map(|(_, ending)| ending));
                let stem = endings.filter_map(|end| from.strip_suffix(end)).next();
                stem.map(|stem| format!("{stem}{ending}"))
            }
            (Some(from), None) if resized => Some(from.clone()),
            _ => None,
        };
        let labels = labels.filter(|_| task != Some("QUESTION_ANS"));
        if self.config.is_some() {
            self.edits.head = Some((to.clone(), labels));
            self.notes.push(Note::Architecture { from: from.clone(), to: to.clone(), labels });
        }
        if to.is_some() && to != from {
            self.remove_old_heads();
        }
        true
    }

    /// Heads over the vocabulary, which a model with another head does not have.
    fn remove_old_heads(&mut self) {
        const OLD: [&str; 4] = ["lm_head.", "cls.", "embed_out.", "predictions."];
        let old: Vec<String> = self
            .plan
            .iter()
            .filter(|(tensor, planned)| {
                matches!(planned.origin, Origin::Base(_) | Origin::Packed(_))
                    && OLD.iter().any(|start| tensor.starts_with(start))
            })
            .map(|(tensor, _)| tensor.clone())
            .collect();
        for tensor in old {
            self.plan.remove(&tensor);
            self.notes.push(Note::Removed { tensor });
        }
    }

    /// The number of words, if embeddings have another one now; input and output must agree.
    fn settle_vocabulary(&mut self) -> Result<(), CheckpointError> {
        let resized: Vec<(String, usize, usize)> = self
            .notes
            .iter()
            .filter_map(|note| match note {
                Note::Resized { tensor, from, to } => {
                    let module = module_of(tensor, "weight")?;
                    (is_head(module) || EMBEDDINGS.contains(&last(module))).then(|| (tensor.clone(), from[0], to[0]))
                }
                _ => None,
            })
            .collect();
        let Some((tensor, from, to)) = resized.first().cloned() else { return Ok(()) };
        let mut others = self.plan.iter().filter(|(name, planned)| {
            let module = module_of(name, "weight");
            module.is_some_and(|module| is_head(module) || EMBEDDINGS.contains(&last(module)))
                && planned.info.shape.len() == 2
                && planned.info.shape[0] == from
        });
        if let Some((other, _)) = others.find(|(other, _)| **other != tensor) {
            let shape = |tensor: &str| self.plan.get(tensor).map_or(&[][..], |planned| &planned.info.shape);
            let (own, its) = (shape(&tensor), shape(other));
            let reason = format!("shape {own:?} in the adapter, but {other} has {its:?}, as in the base");
            return Err(CheckpointError::Unexpected { tensor, reason });
        }
        if self.config.is_some() {
            self.edits.vocabulary = Some((from, to));
            self.notes.push(Note::Vocabulary { from, to });
        }
        Ok(())
    }
}

/// Whether a module was to be trained as a whole.
fn is_saved(adapter: &PeftAdapter, module: &str) -> bool {
    adapter.config().modules_to_save().iter().any(|saved| last(saved) == last(module))
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
