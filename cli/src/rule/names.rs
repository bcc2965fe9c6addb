//! What a module is, judged by its name: for models whose architecture transformers does not have.

use super::architecture::Kind;

/// Embeddings that are not called so: GPT-2 and its kin, T5.
const EMBEDDINGS: [&str; 4] = ["wte", "wpe", "shared", "relative_attention_bias"];

/// Output heads, which transformers does not quantize, and which may be tied to the embedding.
pub(super) const HEADS: [&str; 8] = [
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "qa_outputs",
    "proj_out",
    "cls.predictions.decoder",
    "generator_lm_head",
];

/// What the module of a two-dimensional weight seems to be.
///
/// Experts are not taken for `Linear`: transformers 5 joins those of all its models into one parameter.
pub(super) fn kind(module: &str) -> Kind {
    let last = module.rsplit('.').next().unwrap_or(module);
    let is_expert = module.split('.').any(|part| part == "experts");
    let is_router =
        module.ends_with("mlp.gate") || ["router", "block_sparse_moe.gate"].iter().any(|r| module.ends_with(r));
    if last.contains("embed") || EMBEDDINGS.contains(&last) || is_expert || is_router {
        Kind::Other
    } else {
        Kind::Linear
    }
}
