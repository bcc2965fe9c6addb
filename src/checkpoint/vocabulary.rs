//! Names of modules that have a row for each word: input embeddings and output heads.

use super::names::last;

/// Names of input embeddings; where a model has several, an earlier one is that which others are tied to.
pub(super) const EMBEDDINGS: [&str; 9] = [
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

/// Whether a module has the name of an input embedding.
pub(super) fn is_embedding(module: &str) -> bool {
    EMBEDDINGS.contains(&last(module))
}

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
