//! The names of tensors in an adapter.
//!
//! PEFT writes `base_model.model.<module>.lora_A.weight`; its state in memory has the name of the adapter besides
//! (`lora_A.default.weight`), and wrappers of modules leave parts of their own, which PEFT takes out when it saves, but
//! which other savers do not.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::names::join;
use super::PREFIX;

/// Parts that wrappers of modules put into names: of `torch.compile`, FSDP, activation checkpoints.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The name of an adapter that PEFT gives where none is given.
const ADAPTER: &str = "default";

/// What a tensor of an adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    /// A part of a pair: `lora_A.weight`, `lora_embedding_A`, `lora_magnitude_vector` and so on; `depth` is the number
    /// of `base_layer` before it, by which adapters of parameters of one module stand in each other.
    Lora { module: String, depth: usize, part: String },
    /// Rows of an embedding, for some tokens.
    Tokens { module: String },
    /// A tensor of the base under an adapter: its value before what the adapter adds.
    Base { tensor: String },
    /// A tensor that was trained as a whole.
    Whole { tensor: String, is_wrapped: bool },
    /// A copy of the base that nothing needs.
    Unused,
}

impl Key {
    pub(super) fn parse(name: &str) -> Result<Self, CheckpointError> {
        let mut parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
        if parts.len() > 2 && parts[0] == "module" && parts[1] == "base_model" {
            parts.remove(0);
        }
        let [prefix, model, ..] = *parts else { return Err(unexpected(name)) };
        if format!("{prefix}.{model}.") != PREFIX {
            return Err(unexpected(name));
        }
        let parts = &parts[2..];
        if let Some(at) = parts.iter().position(|part| part.starts_with("lora_")) {
            let depth = parts[..at].iter().rev().take_while(|part| **part == "base_layer").count();
            return Ok(Self::Lora { module: parts[..at - depth].join("."), depth, part: lora_part(&parts[at..]) });
        }
        let split = |word: &str| parts.iter().position(|part| *part == word).map(|at| (&parts[..at], &parts[at + 1..]));
        if let Some((module, rest)) = split("token_adapter") {
            let module = module.join(".");
            return Ok(match rest {
                ["trainable_tokens_delta"] | ["trainable_tokens_delta", _] => Self::Tokens { module },
                ["base_layer", rest @ ..] => Self::Base { tensor: join(&module, &rest.join(".")) },
                _ => Self::Unused,
            });
        }
        for (word, is_base) in [("original_module", true), ("modules_to_save", false), ("base_layer", true)] {
            let Some((module, rest)) = split(word) else { continue };
            let rest = rest.strip_prefix(&[ADAPTER]).unwrap_or(rest);
            let tensor = join(&module.join("."), &rest.join("."));
            // The bias under an adapter is trained, not frozen, if it is in the file.
            let is_base = is_base && !(word == "base_layer" && rest == ["bias"]);
            if !is_base && word == "base_layer" {
                return Ok(Self::Whole { tensor, is_wrapped: false });
            }
            return Ok(if is_base { Self::Base { tensor } } else { Self::Whole { tensor, is_wrapped: true } });
        }
        Ok(Self::Whole { tensor: parts.join("."), is_wrapped: false })
    }
}

/// The part of a pair without the name of the adapter.
fn lora_part(parts: &[&str]) -> String {
    match parts {
        // Before PEFT 0.11 the magnitude was a parameter of a module of its own.
        ["lora_magnitude_vector", ..] => "lora_magnitude_vector".to_owned(),
        [part @ ("lora_embedding_A" | "lora_embedding_B"), _] => (*part).to_owned(),
        [part @ ("lora_A" | "lora_B"), _, end] => format!("{part}.{end}"),
        parts => parts.join("."),
    }
}

fn unexpected(name: &str) -> CheckpointError {
    let reason = format!("the name does not start with {PREFIX}");
    CheckpointError::Unexpected { tensor: name.to_owned(), reason }
}
