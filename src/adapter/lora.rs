//! The low-rank pair of `LoRA`, and the magnitude of `DoRA`.

use alloc::vec::Vec;

use crate::adapter::pair::Pair;
use crate::buffer::reserved;
use crate::error::{Error, check_finite, check_len, check_matrix};
use crate::round::to_f32;
use crate::tensor::Tensor;

/// The seed of `A` if none is given. Layers of the same shape then start with the same `A`.
pub const DEFAULT_SEED: u64 = 0;

/// How the scale of an adapter follows from its alpha and rank: standard `LoRA` or `rsLoRA`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LoRAScaling {
    /// `alpha / rank` (Hu et al., "`LoRA`", 2021).
    #[default]
    Standard,
    /// `alpha / sqrt(rank)` (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with `LoRA`", 2023).
    #[doc(alias = "use_rslora")]
    RsLoRA,
}

impl LoRAScaling {
    /// Computes the scale in f64, as PEFT does, and rounds it once to f32. With rank 0, it divides by zero.
    #[must_use]
    pub fn compute(self, alpha: f64, rank: usize) -> f32 {
        let divisor = match self {
            Self::Standard => rank as f64,
            Self::RsLoRA => libm::sqrt(rank as f64),
        };
        to_f32(alpha / divisor)
    }
}

/// A `LoRA` adapter for a weight `[d_out, d_in]`: the low-rank pair `A` `[rank, d_in]` and `B` `[d_out, rank]`, and a scale.
///
/// It adds `scale * B A` to the weight, without ever forming that product. Both matrices are row-major and trained; the rank
/// may be any number from 1 on. With a magnitude ([`Self::with_dora`], [`Self::with_magnitude`]) it is a `DoRA` adapter (Liu
/// et al., "`DoRA`: Weight-Decomposed Low-Rank Adaptation", 2024), which also scales each row of the adapted weight.
///
/// ```
/// use nf4::{LoRAAdapter, LoRAScaling};
/// let (d_out, d_in, rank, alpha) = (2, 4, 1, 2.0);
/// // Fresh, for training: A is random, B is zero.
/// let fresh = LoRAAdapter::new(d_out, d_in, rank, alpha, LoRAScaling::Standard, 7)?;
/// // From a trained pair:
/// let (a, b) = (vec![1.0; rank * d_in], vec![0.5; d_out * rank]);
/// let trained = LoRAAdapter::from_parts(a, b, d_out, d_in, rank, alpha, LoRAScaling::Standard)?;
/// assert_eq!((fresh.scale(), trained.scale()), (2.0, 2.0));
/// # Ok::<(), nf4::Error>(())
/// ```
#[doc(alias = "LoraLayer")]
#[derive(Debug, Clone)]
pub struct LoRAAdapter {
    a: Tensor,
    b: Tensor,
    magnitude: Magnitude,
    d_out: usize,
    d_in: usize,
    rank: usize,
    alpha: f64,
    scaling: LoRAScaling,
    scale: f32,
}

#[derive(Debug, Clone)]
enum Magnitude {
    /// `LoRA`.
    None,
    /// `DoRA` whose magnitude will be the norms of the rows when it first joins a base.
    Norms,
    Given(Tensor),
}

/// Construction.
impl LoRAAdapter {
    /// A fresh adapter as PEFT makes it: `A` uniform in `+-1/sqrt(d_in)` (Kaiming with `a = sqrt(5)`) and `B` zero, so that
    /// it adds nothing yet.
    ///
    /// The values of `A` are the same on every machine: value `i` is `(u / 2^23 - 1)` times the f32 `1/sqrt(d_in)`, where `u`
    /// is the upper 24 bits of output `i` of `SplitMix64` (Steele, Lea, Flood, 2014) with `seed` as its state.
    ///
    /// # Errors
    /// [`Error::RankZero`] if `rank` is 0; [`Error::Alpha`] if alpha or the scale is NaN or infinite; [`Error::Shape`] if
    /// `rank * d_in` or `d_out * rank` does not fit in `usize`; [`Error::OutOfMemory`].
    pub fn new(
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f64,
        scaling: LoRAScaling,
        seed: u64,
    ) -> Result<Self, Error> {
        let (mut a, mut b) = (reserved(rank, d_in)?, reserved(d_out, rank)?);
        let bound = 1.0 / libm::sqrtf(d_in as f32);
        a.extend(uniform(seed).take(rank * d_in).map(|u| u * bound));
        b.resize(d_out * rank, 0.0);
        Self::from_parts(a, b, d_out, d_in, rank, alpha, scaling)
    }

    /// An adapter with given `A` `[rank, d_in]` and `B` `[d_out, rank]`, row-major.
    ///
    /// # Errors
    /// [`Error::RankZero`] if `rank` is 0; [`Error::Alpha`] if alpha or the scale is NaN or infinite;
    /// [`Error::MatrixLength`] if `a` or `b` has the wrong length; [`Error::NotFinite`] if one of their values is NaN or
    /// infinite; [`Error::Shape`] if `rank * d_in` or `d_out * rank` does not fit in `usize`.
    pub fn from_parts(
        a: Vec<f32>,
        b: Vec<f32>,
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f64,
        scaling: LoRAScaling,
    ) -> Result<Self, Error> {
        if rank == 0 {
            return Err(Error::RankZero);
        }
        let scale = scaling.compute(alpha, rank);
        if !scale.is_finite() {
            return Err(Error::Alpha { got: alpha });
        }
        check_matrix("lora_a", &a, rank, d_in)?;
        check_matrix("lora_b", &b, d_out, rank)?;
        check_finite("lora_a", &a)?;
        check_finite("lora_b", &b)?;
        let (a, b) = (Tensor::from_vec(a, true), Tensor::from_vec(b, true));
        Ok(Self { a, b, magnitude: Magnitude::None, d_out, d_in, rank, alpha, scaling, scale })
    }

    /// Makes this a `DoRA` adapter. When it first joins a base, its magnitude is set to the norms of the rows of the
    /// adapted weight, as in PEFT, so that a fresh adapter changes nothing yet.
    #[doc(alias = "use_dora")]
    #[must_use]
    pub fn with_dora(self) -> Self {
        Self { magnitude: Magnitude::Norms, ..self }
    }

    /// Makes this a `DoRA` adapter with a given magnitude, `[d_out]`, which PEFT calls `lora_magnitude_vector`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `d_out` values; [`Error::NotFinite`] if one of them is NaN or infinite.
    #[doc(alias = "lora_magnitude_vector")]
    pub fn with_magnitude(self, magnitude: Vec<f32>) -> Result<Self, Error> {
        check_len("lora_magnitude_vector", self.d_out, magnitude.len())?;
        check_finite("lora_magnitude_vector", &magnitude)?;
        Ok(Self { magnitude: Magnitude::Given(Tensor::from_vec(magnitude, true)), ..self })
    }

    /// Sets the magnitude to the norms of the rows, if it has none yet.
    pub(crate) fn take_norms(&mut self, norms: impl FnOnce() -> Result<Vec<f32>, Error>) -> Result<(), Error> {
        if let Magnitude::Norms = self.magnitude {
            self.magnitude = Magnitude::Given(Tensor::from_vec(norms()?, true));
        }
        Ok(())
    }
}

/// Tensors.
impl LoRAAdapter {
    /// `A`, `[rank, d_in]` row-major.
    #[doc(alias = "lora_A")]
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// `A`, mutably. If it is replaced by a tensor of another length, whatever uses the adapter returns an error.
    pub fn a_mut(&mut self) -> &mut Tensor {
        &mut self.a
    }

    /// `B`, `[d_out, rank]` row-major.
    #[doc(alias = "lora_B")]
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// `B`, mutably. If it is replaced by a tensor of another length, whatever uses the adapter returns an error.
    pub fn b_mut(&mut self) -> &mut Tensor {
        &mut self.b
    }

    /// Whether this is a `DoRA` adapter.
    #[must_use]
    pub fn is_dora(&self) -> bool {
        !matches!(self.magnitude, Magnitude::None)
    }

    /// The magnitude of `DoRA`, `[d_out]`. `None` without `DoRA`, and for an adapter from [`Self::with_dora`] before it has
    /// joined a base.
    #[must_use]
    pub fn magnitude(&self) -> Option<&Tensor> {
        if let Magnitude::Given(magnitude) = &self.magnitude { Some(magnitude) } else { None }
    }

    /// The magnitude of `DoRA`, mutably; `None` where [`Self::magnitude`] is.
    pub fn magnitude_mut(&mut self) -> Option<&mut Tensor> {
        if let Magnitude::Given(magnitude) = &mut self.magnitude { Some(magnitude) } else { None }
    }

    /// The tensors that are trained: `A`, `B` and, with `DoRA`, the magnitude.
    pub fn trainable_params(&mut self) -> Vec<&mut Tensor> {
        self.tensors_mut().collect()
    }

    /// Sets all gradients to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.tensors_mut().for_each(Tensor::zero_grad);
    }

    /// Allocates the gradients of all trained tensors that have none.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn make_gradients(&mut self) -> Result<(), Error> {
        self.tensors_mut().try_for_each(|tensor| tensor.grad_mut().map(drop))
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let magnitude = if let Magnitude::Given(magnitude) = &mut self.magnitude { Some(magnitude) } else { None };
        [&mut self.a, &mut self.b].into_iter().chain(magnitude)
    }

    /// The tensors, if they have the right lengths.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if `A` or `B` was replaced by a tensor of another length; [`Error::Shape`] if the magnitude
    /// was.
    pub(crate) fn pair(&self) -> Result<Pair<'_>, Error> {
        let (a, b) = (self.a.data(), self.b.data());
        let magnitude = self.magnitude().map(Tensor::data);
        check_matrix("lora_a", a, self.rank, self.d_in)?;
        check_matrix("lora_b", b, self.d_out, self.rank)?;
        magnitude.map_or(Ok(()), |m| check_len("lora_magnitude_vector", self.d_out, m.len()))?;
        Ok(Pair { a, b, magnitude, d_in: self.d_in, rank: self.rank, scale: self.scale })
    }
}

/// Accessors.
impl LoRAAdapter {
    /// Number of outputs of the weight.
    #[must_use]
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Number of inputs of the weight.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// The rank.
    #[doc(alias = "r")]
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The alpha from which the scale was computed.
    #[doc(alias = "lora_alpha")]
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// How the scale follows from alpha and rank.
    #[must_use]
    pub fn scaling(&self) -> LoRAScaling {
        self.scaling
    }

    /// The factor of `B A`: `alpha / rank` or `alpha / sqrt(rank)`.
    #[doc(alias = "scaling")]
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes on the heap: `A`, `B`, the magnitude of `DoRA`, and gradients where there are any.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.a.memory_bytes() + self.b.memory_bytes() + self.magnitude().map_or(0, Tensor::memory_bytes)
    }
}

/// `SplitMix64` as uniform numbers in `[-1, 1)`, multiples of 2^-23.
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
