//! What a merge did that a user may not expect.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// A difference between a merged model and its base, or a decision that the merge took.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// A module of the adapter has another name in the model.
    Renamed {
        /// The prefix in the adapter.
        from: String,
        /// The prefix in the model.
        to: String,
        /// The number of modules.
        modules: usize,
    },
    /// The merged model has a tensor that the base does not have.
    Added {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The merged model does not have a tensor of the base, which belongs to a head that another one replaces.
    Removed {
        /// The tensor.
        tensor: String,
    },
    /// Two weights were one in the base.
    Untied {
        /// The output head, which has a weight of its own now.
        head: String,
        /// The embedding whose weight it had.
        embedding: String,
    },
    /// A tensor has another shape than in the base.
    Resized {
        /// The tensor.
        tensor: String,
        /// Its shape in the base.
        from: Vec<usize>,
        /// Its shape now.
        to: Vec<usize>,
    },
    /// The vocabulary has another size than in the base.
    Vocabulary {
        /// The number before.
        from: usize,
        /// The number now.
        to: usize,
    },
    /// The model has another class than the base.
    Architecture {
        /// The class of the base, if it is known.
        from: Option<String>,
        /// The class now; if it is not known, `architectures` has to be set by hand.
        to: Option<String>,
        /// The number of labels.
        labels: Option<usize>,
    },
    /// Tensors in another format stay as they are, with their description.
    KeptQuantization {
        /// The format.
        format: String,
        /// The number of tensors.
        tensors: usize,
    },
    /// Two weights are no longer one, but the configuration has no way to say so.
    TiedByClass {
        /// The type of the model.
        model_type: String,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Renamed { from, to, modules } => {
                write!(f, "renamed: \"{from}\" of the adapter is \"{to}\" in the model, in {modules} names")
            }
            Self::Added { tensor, shape } => write!(f, "added: {tensor} {shape:?}"),
            Self::Removed { tensor } => write!(f, "removed: {tensor}"),
            Self::Untied { head, embedding } => {
                write!(f, "untied: {head} now has a weight of its own, no longer that of {embedding}")
            }
            Self::Resized { tensor, from, to } => write!(f, "resized: {tensor} from {from:?} to {to:?}"),
            Self::Vocabulary { from, to } => write!(f, "resized: vocab_size from {from} to {to}"),
            Self::Architecture { from, to, labels } => {
                let from = from.as_deref().unwrap_or("unknown");
                match to {
                    Some(to) => write!(f, "changed: architectures from {from} to {to}")?,
                    None => {
                        write!(f, "architectures is {from} and has to be set by hand to the class of the new head")?
                    }
                }
                labels.map_or(Ok(()), |labels| write!(f, ", with {labels} labels"))
            }
            Self::KeptQuantization { format, tensors } => {
                write!(f, "kept: {tensors} tensors of {format}, and quantization_config")
            }
            Self::TiedByClass { model_type } => write!(
                f,
                "{model_type} ties its weights whatever config.json says, unless both are in the file and differ, as they do \
                 now: transformers before 5 would tie them again"
            ),
        }
    }
}
