//! The choice of the next token.

use alloc::vec::Vec;

use crate::math::exp;

/// How the next token is chosen. The default is the likeliest one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 takes the largest.
    pub temperature: f32,
    /// The number of largest logits to sample from; 0 takes all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: f32,
    /// The start of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses tokens. The choices follow from logits and seed, on every machine.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: fastrand::Rng,
    /// Tokens that may be chosen, and their weights.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, random: fastrand::Rng::with_seed(sampling.seed), candidates: Vec::new() }
    }

    /// The next token. Of equal logits the first counts as larger; NaN is never chosen, unless all are NaN: then it is
    /// token 0.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if temperature <= 0.0 {
            return argmax(logits);
        }
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits.iter().copied()).filter(|(_, logit)| !logit.is_nan()));
        let candidates = &mut self.candidates;
        let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k, descending);
            candidates.truncate(top_k);
        }
        // The order counts for the sums below.
        if top_k > 0 || top_p < 1.0 {
            candidates.sort_unstable_by(descending);
        }
        let max = candidates.iter().fold(f32::NEG_INFINITY, |m, (_, logit)| m.max(*logit));
        let mut total = 0.0;
        for (_, weight) in candidates.iter_mut() {
            *weight = exp((*weight - max) / temperature);
            total += *weight;
        }
        if top_p < 1.0 {
            let (limit, mut sum) = (top_p * total, 0.0);
            let count = candidates.iter().position(|(_, weight)| {
                sum += weight;
                sum >= limit
            });
            candidates.truncate(count.map_or(candidates.len(), |n| n + 1));
            total = candidates.iter().map(|(_, weight)| weight).sum();
        }
        let mut rest = self.random.f32() * total;
        let chosen = candidates.iter().find(|(_, weight)| {
            rest -= weight;
            rest < 0.0
        });
        chosen.or(candidates.last()).map_or(0, |(token, _)| *token)
    }
}

/// The place of the largest logit, the first of equal ones.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(logits) {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, f32::NAN, 3.0, -1.0];

    fn counts(sampling: Sampling) -> [u32; 5] {
        let (mut sampler, mut counts) = (Sampler::new(sampling), [0; 5]);
        (0..10_000).for_each(|_| counts[sampler.choose(&LOGITS) as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampling::default()), [0, 10_000, 0, 0, 0]);
        assert_eq!(argmax(&[f32::NAN; 3]), 0);
    }

    #[test]
    fn frequencies_are_those_of_the_softmax() {
        let weights: Vec<f64> = LOGITS.iter().map(|x| if x.is_nan() { 0.0 } else { f64::from(*x).exp() }).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts(Sampling { temperature: 1.0, ..Sampling::default() }).iter().zip(weights) {
            // Four standard deviations of a binomial distribution are below 0.02.
            assert!((f64::from(*count) / 10_000.0 - weight / total).abs() < 0.02);
        }
    }

    #[test]
    fn top_k_and_top_p_cut() {
        let one = Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() };
        assert_eq!(counts(one), [0, 10_000, 0, 0, 0]);
        let two = counts(Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() });
        assert!(two[1] > 4500 && two[3] > 4500 && two[1] + two[3] == 10_000, "{two:?}");
        // The two largest have 0.93 of the probability.
        let most = counts(Sampling { temperature: 1.0, top_p: 0.9, ..Sampling::default() });
        assert!(most[1] + most[3] == 10_000 && most[3] > 4500, "{most:?}");
        let all = counts(Sampling { temperature: 1.0, top_p: 0.95, ..Sampling::default() });
        assert!(all[0] > 0 && all[4] == 0, "{all:?}");
    }

    #[test]
    fn seeds_are_repeatable() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        assert_eq!(counts(sampling), counts(sampling));
        assert_ne!(counts(sampling), counts(Sampling { seed: 8, ..sampling }));
    }
}
