//! How well a model predicts a text, and how near its predictions are to the exact ones.

use anyhow::{Result, ensure};
use nf4_llama::{Cache, CacheType, Logits, Model, Part, Workspace, argmax};

/// Tokens of a pass.
const BATCH: usize = 128;

/// How a model's predictions of a text's tokens are, and how they agree with the exact ones.
pub(crate) struct Agreement {
    pub(crate) perplexity: f64,
    /// The mean Kullback-Leibler divergence of a next token's distribution from the exact one, in nats.
    pub(crate) divergence: f64,
    /// The part of the positions where both have the same likeliest token.
    pub(crate) same_top: f64,
}

/// Where the logits that count as exact come from.
pub(crate) enum Truth<'a> {
    /// `[tokens, vocabulary]`.
    Logits(Vec<f32>),
    /// What a model computes.
    Model(Box<Run<'a>>),
}

/// A model that reads a text.
pub(crate) struct Run<'a> {
    model: &'a Model,
    workspace: Workspace,
    cache: Cache,
}

impl<'a> Truth<'a> {
    /// What a model computes for a text of `tokens` tokens.
    pub(crate) fn model(model: &'a Model, tokens: usize) -> Result<Self> {
        Ok(Self::Model(Box::new(Run::new(model, tokens)?)))
    }

    /// The logits of the next tokens; `first` tokens were before.
    fn next(&mut self, first: usize, tokens: &[u32], vocabulary: usize) -> Result<&[f32]> {
        match self {
            Self::Logits(values) => {
                let range = first * vocabulary..(first + tokens.len()) * vocabulary;
                ensure!(values.len() >= range.end, "the reference has too few logits");
                Ok(&values[range])
            }
            Self::Model(run) => run.next(tokens),
        }
    }
}

impl<'a> Run<'a> {
    fn new(model: &'a Model, tokens: usize) -> Result<Self> {
        let workspace = Workspace::new(model, BATCH, BATCH)?;
        Ok(Self { model, workspace, cache: Cache::new(model.config(), tokens, CacheType::F32)? })
    }

    fn next(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let Self { model, workspace, cache } = self;
        Ok(model.forward(&mut [Part { cache, tokens, adapter: None }], Logits::All, workspace)?)
    }
}

impl Agreement {
    /// Reads a text in one window.
    pub(crate) fn measure(model: &Model, mut truth: Truth<'_>, ids: &[u32]) -> Result<Self> {
        let vocabulary = model.config().vocabulary;
        let mut run = Run::new(model, ids.len())?;
        let (mut surprise, mut divergence, mut same) = (0.0, 0.0, 0_usize);
        for (first, tokens) in (0..).step_by(BATCH).zip(ids.chunks(BATCH)) {
            let exact = truth.next(first, tokens, vocabulary)?;
            let rows = run.next(tokens)?.chunks_exact(vocabulary).zip(exact.chunks_exact(vocabulary));
            // The last row has no next token.
            for ((logits, exact), next) in rows.zip(&ids[first + 1..]) {
                let (total, exact_total) = (log_sum_exp(logits), log_sum_exp(exact));
                surprise += total - f64::from(logits[*next as usize]);
                for (q, p) in logits.iter().zip(exact) {
                    let (q, p) = (f64::from(*q) - total, f64::from(*p) - exact_total);
                    divergence += p.exp() * (p - q);
                }
                same += usize::from(argmax(logits) == argmax(exact));
            }
        }
        let count = (ids.len() - 1) as f64;
        Ok(Self { perplexity: (surprise / count).exp(), divergence: divergence / count, same_top: same as f64 / count })
    }
}

/// The logarithm of what a softmax is divided by.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    logits.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() + f64::from(max)
}
