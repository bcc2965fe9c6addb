//! What a model, an adapter or a request had that does not fit.

use alloc::string::{String, ToString};
use core::fmt;

use nf4::checkpoint::CheckpointError;

/// Why a model could not be loaded or run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A field of `config.json` that is missing, has a value that it cannot have, or asks for something that is not
    /// implemented.
    Field {
        /// The field, with the objects around it: `rope_scaling.rope_type`.
        field: String,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// An index of the files of a model.
    Index {
        /// What is wrong.
        reason: String,
    },
    /// A file of the checkpoint, or a tensor in it.
    Checkpoint(CheckpointError),
    /// A layer of the model and what was wrong with it.
    Layer {
        /// The module: `model.layers.0.mlp.up_proj`.
        module: String,
        /// What was wrong.
        error: nf4::Error,
    },
    /// Something that is not implemented.
    Unsupported {
        /// The module, tensor or adapter.
        what: String,
        /// What it has.
        reason: String,
    },
    /// A token that the vocabulary does not have.
    Token {
        /// The token.
        token: u32,
        /// Tokens in the vocabulary.
        vocabulary: usize,
    },
    /// A name that no adapter has, or that another one has already.
    Adapter {
        /// The name.
        name: String,
        /// Whether there are two.
        duplicate: bool,
    },
    /// More positions, tokens or outputs than there is room for.
    Room {
        /// What there is too little of.
        what: &'static str,
        /// How many are needed.
        needed: usize,
        /// How many there are.
        got: usize,
    },
    /// No memory for a buffer.
    Memory {
        /// The buffer.
        what: &'static str,
        /// Its bytes.
        bytes: usize,
    },
    /// A cache that was made for another model.
    ForeignCache,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field { field, expected, got } => write!(f, "config.json: {field} is {got}, expected {expected}"),
            Self::Index { reason } => write!(f, "index of the model's files: {reason}"),
            Self::Checkpoint(error) => error.fmt(f),
            Self::Layer { module, error } => write!(f, "{module}: {error}"),
            Self::Unsupported { what, reason } => write!(f, "{what}: {reason}"),
            Self::Token { token, vocabulary } => write!(f, "token {token} of a vocabulary of {vocabulary}"),
            Self::Adapter { name, duplicate: false } => write!(f, "there is no adapter {name}"),
            Self::Adapter { name, duplicate: true } => write!(f, "there are two adapters of the name {name}"),
            Self::Room { what, needed, got } => write!(f, "{what}: {needed} needed, room for {got}"),
            Self::Memory { what, bytes } => write!(f, "{what}: no memory for {bytes} bytes"),
            Self::ForeignCache => f.write_str("the cache was made for another model"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        // Their texts are part of those above.
        match self {
            Self::Checkpoint(error) => error.source(),
            Self::Layer { error, .. } => error.source(),
            _ => None,
        }
    }
}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(error)
    }
}

impl Error {
    /// [`Self::Layer`], for `map_err`.
    pub(crate) fn layer(module: &str) -> impl Fn(nf4::Error) -> Self {
        move |error| Self::Layer { module: module.to_string(), error }
    }
}

/// A buffer of `len` default values.
pub(crate) fn buffer<T: Clone + Default>(what: &'static str, len: usize) -> Result<alloc::vec::Vec<T>, Error> {
    let mut values = alloc::vec::Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    values.try_reserve_exact(len).map_err(|_| Error::Memory { what, bytes })?;
    values.resize(len, T::default());
    Ok(values)
}
