//! A head for a task in place of that over the vocabulary.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::names::{last, module_of};
use super::super::peft::PeftAdapter;
use super::embeddings::GENERATING;
use super::{Builder, Note, Origin};

impl Builder<'_> {
    /// A head for a task in place of that over the vocabulary. Whether there is one.
    pub(super) fn settle_task(&mut self, adapter: &PeftAdapter) -> bool {
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
}
