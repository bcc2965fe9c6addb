//! The rotary position embedding (Su et al., "`RoFormer`", 2021), in the layout of transformers: a head's first half is
//! rotated with its second.

use alloc::vec::Vec;
use core::f64::consts::PI;

/// The angles by which a head's pairs are rotated, per position.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position, for each pair; rounded to f32 as transformers has them.
    frequencies: Vec<f32>,
}

impl Rope {
    /// `theta^(-2i/d)` for pair `i` of a head of width `d`; `None` if `theta` is not finite and positive.
    pub(crate) fn new(theta: f64, head_dim: usize) -> Option<Self> {
        Self::scaled(theta, head_dim, |frequency| frequency)
    }

    /// Frequencies divided by `factor`.
    pub(crate) fn linear(theta: f64, head_dim: usize, factor: f64) -> Option<Self> {
        Self::scaled(theta, head_dim, |frequency| frequency / factor)
    }

    /// The scaling of Llama 3.1 (`_compute_llama3_parameters` in `modeling_rope_utils.py`): long waves are divided by
    /// `factor`, short ones kept, and those between mixed.
    pub(crate) fn llama3(
        theta: f64,
        head_dim: usize,
        factor: f64,
        low: f64,
        high: f64,
        original_positions: f64,
    ) -> Option<Self> {
        Self::scaled(theta, head_dim, |frequency| {
            // Waves that fit into the positions of the training.
            let waves = original_positions * frequency / (2.0 * PI);
            if waves < low {
                frequency / factor
            } else if waves > high {
                frequency
            } else {
                let smooth = (waves - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        })
    }

    fn scaled(theta: f64, head_dim: usize, scale: impl Fn(f64) -> f64) -> Option<Self> {
        let width = head_dim as f64;
        #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
        let frequency = |i: usize| scale(libm::pow(theta, -2.0 * i as f64 / width)) as f32;
        let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
        let fine = theta > 0.0 && frequencies.iter().all(|f| f.is_finite() && *f > 0.0);
        fine.then_some(Self { frequencies })
    }

    /// Pairs of a head.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Cosine and sine of each pair's angle at a position; slices that are shorter get the first of them. The angle is an
    /// f32 product as in transformers; its cosine and sine are computed in f64 and rounded.
    #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
            let (s, c) = libm::sincos(f64::from(position as f32 * frequency));
            (*cos, *sin) = (c as f32, s as f32);
        }
    }
}

/// Rotates each head of `heads`, `head_dim` values each.
pub(crate) fn rotate(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(head_dim / 2);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
