//! Input and output embeddings: weights that are one, heads that are new, vocabularies that grew.
//!
//! The merged model computes what PEFT's model with the adapter computes.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::names::{join, last, module_of};
use super::super::peft::PeftAdapter;
use super::super::vocabulary::{EMBEDDINGS, is_embedding, is_head};
use super::matching::Names;
use super::{Builder, Note, Planned};

/// The input embedding of a model.
#[derive(Debug, Clone)]
pub(super) struct Embedding {
    pub(super) module: String,
    pub(super) tensor: String,
}

/// Endings of the names of classes with an output head over the vocabulary.
pub(super) const GENERATING: [&str; 6] =
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

    /// The weight of the output head over the vocabulary, by the names of the model, or those of its class.
    pub(super) fn head(&self, names: &Names<'_>) -> String {
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
    pub(super) fn generates(&self) -> bool {
        let architecture = self.config.as_ref().and_then(|config| config.architecture());
        architecture.is_none_or(|architecture| GENERATING.iter().any(|end| architecture.ends_with(end)))
    }

    /// The number of words, if embeddings have another one now; input and output must agree.
    fn settle_vocabulary(&mut self) -> Result<(), CheckpointError> {
        let resized: Vec<(String, usize, usize)> = self
            .notes
            .iter()
            .filter_map(|note| match note {
                Note::Resized { tensor, from, to } => {
                    let module = module_of(tensor, "weight")?;
                    (is_head(module) || is_embedding(module)).then(|| (tensor.clone(), from[0], to[0]))
                }
                _ => None,
            })
            .collect();
        let Some((tensor, from, to)) = resized.first().cloned() else { return Ok(()) };
        let mut others = self.plan.iter().filter(|(name, planned)| {
            let module = module_of(name, "weight");
            module.is_some_and(|module| is_head(module) || is_embedding(module))
                && planned.info.shape.len() == 2
                && planned.info.shape[0] == from
        });
        if let Some((other, _)) = others.find(|(other, _)| **other != tensor) {
            let shape = |tensor: &str| self.plan.get(tensor).map_or(&[][..], |planned| &planned.info.shape);
            let (own, its) = (shape(&tensor), shape(other));
            let reason = format!("shape {own:?} in the adapter, but {other} has {its:?}, as in the base");
            return Err(CheckpointError::Unexpected { tensor, reason });
        }
        let has_rows = |name: &str| {
            let module = module_of(name, "bias").unwrap_or_default();
            is_head(module) || last(module) == "predictions"
        };
        if let Some((bias, _)) = self.plan.iter().find(|(name, planned)| has_rows(name) && planned.info.shape == [from])
        {
            let reason =
                format!("shape [{from}], as in the base, but {tensor} has {to} rows; the adapter has no bias for them");
            return Err(CheckpointError::Unexpected { tensor: bias.clone(), reason });
        }
        if self.config.is_some() {
            self.edits.vocabulary = Some((from, to));
            self.notes.push(Note::Vocabulary { from, to });
        }
        Ok(())
    }
}
