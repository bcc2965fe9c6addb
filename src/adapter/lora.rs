//! The low-rank pair of `LoRA`, and what it adds to a product and to a weight.

use alloc::vec::Vec;

use nf4_kernels::{Float, Kernels};

use crate::adapter::dora::{self, Dora};
use crate::buffer::reserved;
use crate::error::{Error, check_finite, check_len, check_matrix};
use crate::tensor::Tensor;

/// The seed of `A` where none is given. Layers of one shape then start with the same `A`.
pub const DEFAULT_SEED: u64 = 0;

/// How alpha and rank give the factor of the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LoRAScaling {
    /// `alpha / rank` (Hu et al., "`LoRA`", 2021).
    #[default]
    Standard,
    /// `alpha / sqrt(rank)` (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with `LoRA`", 2023).
    RsLoRA,
}

impl LoRAScaling {
    /// The factor, computed in f64 as PEFT does and rounded once to f32. Rank 0 divides by zero.
    #[must_use]
    pub fn compute(self, alpha: f32, rank: usize) -> f32 {
        let divisor = match self {
            Self::Standard => rank as f64,
            Self::RsLoRA => libm::sqrt(rank as f64),
        };
        to_f32(f64::from(alpha) / divisor)
    }
}

/// A `LoRA` adapter for a weight `[d_out, d_in]`: `A` `[rank, d_in]` and `B` `[d_out, rank]`, both row-major and
/// trained, and a scale. It stands for the weight `scale * B A`, which is never formed.
///
/// The rank may be anything from 1, larger than a block or than the weight too. With a magnitude ([`Self::with_dora`],
/// [`Self::try_with_magnitude`]) it is a `DoRA` adapter, which also scales each row of the adapted weight.
#[derive(Debug, Clone)]
pub struct LoRAAdapter {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) dora: Option<Dora>,
    d_out: usize,
    d_in: usize,
    rank: usize,
    alpha: f32,
    scaling: LoRAScaling,
    scale: f32,
}

impl LoRAAdapter {
    /// A fresh adapter as PEFT makes it: `A` uniform in `+-1/sqrt(d_in)` (Kaiming with `a = sqrt(5)`), `B` zero, so
    /// that it adds nothing yet.
    ///
    /// The values of `A` are the same on each machine: value `i` comes from output `i` of `SplitMix64` (Steele, Lea,
    /// Flood, 2014) with `seed` as state, of which the upper 24 bits, less 2^23, over 2^23, are multiplied by the f32
    /// `1/sqrt(d_in)`.
    ///
    /// # Errors
    /// [`Error::RankZero`]; [`Error::Alpha`] if alpha is NaN or infinite; [`Error::Shape`] if there is no room for
    /// `rank * d_in` or `d_out * rank` values.
    pub fn try_init(
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f32,
        scaling: LoRAScaling,
        seed: u64,
    ) -> Result<Self, Error> {
        let (mut a, mut b) = (reserved(rank, d_in)?, reserved(d_out, rank)?);
        let bound = 1.0 / libm::sqrtf(d_in as f32);
        a.extend(uniform(seed).take(rank * d_in).map(|u| u * bound));
        b.resize(d_out * rank, 0.0);
        Self::try_from_parts(a, b, [d_out, d_in], rank, alpha, scaling)
    }

    /// An adapter from given `A` `[rank, d_in]` and `B` `[d_out, rank]`, row-major; `shape` is `[d_out, d_in]`.
    ///
    /// # Errors
    /// [`Error::RankZero`]; [`Error::Alpha`] if alpha is NaN or infinite; [`Error::MatrixLength`] if `a` or `b` has
    /// the wrong length; [`Error::NotFinite`] if one of their values is NaN or infinite.
    pub fn try_from_parts(
        a: Vec<f32>,
        b: Vec<f32>,
        shape: [usize; 2],
        rank: usize,
        alpha: f32,
        scaling: LoRAScaling,
    ) -> Result<Self, Error> {
        let [d_out, d_in] = shape;
        if rank == 0 {
            return Err(Error::RankZero);
        }
        if !alpha.is_finite() {
            return Err(Error::Alpha { got: alpha });
        }
        check_matrix("lora_a", &a, rank, d_in)?;
        check_matrix("lora_b", &b, d_out, rank)?;
        check_finite("lora_a", &a)?;
        check_finite("lora_b", &b)?;
        let (a, b) = (Tensor::from_vec(a, true), Tensor::from_vec(b, true));
        Ok(Self { a, b, dora: None, d_out, d_in, rank, alpha, scaling, scale: scaling.compute(alpha, rank) })
    }

    /// `Ok` if the tensors have their lengths: each can be replaced by another one.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_matrix("lora_a", self.a.data(), self.rank, self.d_in)?;
        check_matrix("lora_b", self.b.data(), self.d_out, self.rank)?;
        self.magnitude().map_or(Ok(()), |m| check_len("lora_magnitude_vector", self.d_out, m.len()))
    }

    /// `y += scale * B (A x)`: two dense f32 products of the kernels. `low_rank` gets `A x`, `[rank]`. A magnitude of
    /// `DoRA` is not applied: it scales the product of the base too.
    ///
    /// A NaN or infinity in `x`, `A` or `B` gives what IEEE 754 says; every NaN in `y` is [`f32::NAN`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values, `low_rank` not `rank` or `y` not `d_out`.
    pub fn add_product(&self, kernels: Kernels, x: &[f32], low_rank: &mut [f32], y: &mut [f32]) -> Result<(), Error> {
        check_len("input", self.d_in, x.len())?;
        check_len("output", self.d_out, y.len())?;
        check_len("low-rank product", self.rank, low_rank.len())?;
        kernels.gemv_dense(self.a.data(), x, low_rank)?;
        Ok(kernels.gemv_dense_add(self.b.data(), low_rank, self.scale, y)?)
    }

    /// A row of the adapted weight in place of that of the base: `w + scale * b A`; with a magnitude `m` that times
    /// `m` over its norm.
    ///
    /// All of it is f64, sums in the order of the rank, and each weight is rounded once to f32. So the bits are the
    /// same everywhere, and what rounding adds is half an ulp of the result. Every NaN is [`f32::NAN`].
    pub(crate) fn merge_row(&self, row: usize, weights: &mut [f32]) {
        let gain = self.magnitude().map_or(1.0, |m| dora::gain(m.data()[row], to_f32(self.norm(row, weights))));
        self.adapted(row, weights, |weight, sum| *weight = to_f32(gain * sum));
    }

    /// The norm of a row of the adapted weight, `|w + scale * b A|`, all f64.
    pub(crate) fn norm(&self, row: usize, weights: &[f32]) -> f64 {
        let mut sum = 0.0;
        self.adapted(row, weights, |_, w| sum += w * w);
        libm::sqrt(sum)
    }

    /// Calls `f` with each weight of a row of the base, in order, and its `w + scale * b A`.
    fn adapted<W: core::borrow::Borrow<f32>>(
        &self,
        row: usize,
        weights: impl IntoIterator<Item = W>,
        mut f: impl FnMut(W, f64),
    ) {
        /// Columns whose sums are held at a time, on the stack.
        const SPAN: usize = 64;
        let (b, scale) = (&self.b.data()[row * self.rank..][..self.rank], f64::from(self.scale));
        let mut weights = weights.into_iter();
        for start in (0..self.d_in).step_by(SPAN) {
            let count = SPAN.min(self.d_in - start);
            let mut sums = [0.0_f64; SPAN];
            for (b, a) in b.iter().zip(self.a.data().chunks_exact(self.d_in)) {
                for (sum, a) in sums.iter_mut().zip(&a[start..][..count]) {
                    *sum += f64::from(*b) * f64::from(*a);
                }
            }
            for (sum, weight) in sums.into_iter().take(count).zip(&mut weights) {
                let w = f64::from(*weight.borrow());
                f(weight, w + scale * sum);
            }
        }
    }
}

/// What it is.
impl LoRAAdapter {
    /// `A`, `[rank, d_in]` row-major.
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// `A`, to be changed; its length must not. With `DoRA`, norms are stale from here on.
    pub fn a_mut(&mut self) -> &mut Tensor {
        self.norms_are_stale();
        &mut self.a
    }

    /// `B`, `[d_out, rank]` row-major.
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// `B`, to be changed; its length must not. With `DoRA`, norms are stale from here on.
    pub fn b_mut(&mut self) -> &mut Tensor {
        self.norms_are_stale();
        &mut self.b
    }

    /// `A`, `B` and, with `DoRA`, the magnitude, to be trained. With `DoRA`, norms are stale from here on.
    pub fn trainable_params(&mut self) -> Vec<&mut Tensor> {
        self.norms_are_stale();
        let magnitude = self.dora.as_mut().and_then(|dora| dora.magnitude.as_mut());
        [&mut self.a, &mut self.b].into_iter().chain(magnitude).collect()
    }

    /// Sets the gradients to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        let magnitude = self.dora.as_mut().and_then(|dora| dora.magnitude.as_mut());
        [&mut self.a, &mut self.b].into_iter().chain(magnitude).for_each(Tensor::zero_grad);
    }

    /// Outputs of the weight.
    #[must_use]
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Inputs of the weight.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// The rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The alpha that the scale was made from.
    #[must_use]
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// How the scale was made.
    #[must_use]
    pub fn scaling(&self) -> LoRAScaling {
        self.scaling
    }

    /// The factor of `B A`: `alpha / rank` or `alpha / sqrt(rank)`.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes on the heap: `A`, `B`, and with `DoRA` magnitude, norms and gains; gradients where there are any.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.a.memory_bytes() + self.b.memory_bytes() + self.dora.as_ref().map_or(0, Dora::memory_bytes)
    }
}

/// Rounds to nearest even; every NaN becomes [`f32::NAN`].
pub(crate) fn to_f32(x: f64) -> f32 {
    #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    f32::from_f32(x as f32)
}

/// `SplitMix64` as numbers uniform in `[-1, 1)`, multiples of 2^-23.
fn uniform(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    core::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let z = z ^ (z >> 31);
        (z >> 40) as f32 / 8_388_608.0 - 1.0
    })
}
