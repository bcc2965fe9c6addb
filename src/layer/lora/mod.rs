//! `LoRA` on a dense base weight.

mod forward;
mod train;

use alloc::boxed::Box;
#[cfg(target_has_atomic = "ptr")]
use alloc::sync::Arc;
use alloc::vec::Vec;

use nf4_kernels::Kernels;

use crate::adapter::joined::Joined;
use crate::adapter::lora::{DEFAULT_SEED, LoRAAdapter, LoRAScaling};
use crate::buffer::copy;
use crate::error::{Error, check_finite, check_matrix, or_panic};
use crate::layer::linear::checked_bias;
use crate::layer::methods::adapter_accessors;
use crate::parallel::Executor;
#[cfg(target_has_atomic = "ptr")]
use crate::parallel::Threads;
use crate::tensor::Tensor;
use crate::weight::base::Base;

/// A linear layer with a dense, frozen base weight and a `LoRA` adapter: `y = W x + scale * B (A x) + bias`.
///
/// `W` is `[d_out, d_in]`, and the bias is frozen too ([`Self::with_bias`]; a layer starts without one). With `DoRA` (see
/// [`LoRAAdapter`]), each row of `W x + scale * B (A x)` is scaled. All arithmetic is f32 (merges and norms: f64, rounded
/// once), with the same bits on every machine.
#[derive(Debug, Clone)]
pub struct LoRALayer {
    frozen: Frozen,
    /// `W + scale * B A` while merged. `frozen` is kept, because subtracting would round and not give it back bit for
    /// bit.
    merged: Option<Tensor>,
    bias: Option<Box<[f32]>>,
    adapter: Joined,
}

/// The weight before any merge, its shape, and what computes with it.
#[derive(Debug, Clone)]
struct Frozen {
    weight: Tensor,
    d_out: usize,
    d_in: usize,
    executor: Executor,
}

impl Frozen {
    fn base(&self) -> Base<'_> {
        self.with(&self.weight)
    }

    /// Another weight of this shape.
    fn with<'a>(&'a self, weight: &'a Tensor) -> Base<'a> {
        Base::dense(weight.data(), self.d_out, self.d_in, &self.executor)
    }
}

/// Construction.
impl LoRALayer {
    /// A layer on `base_weight`, row-major `[d_out, d_in]`, with a fresh adapter of scale `alpha / rank`: random `A` (see
    /// [`LoRAAdapter::new`]; the seed is [`DEFAULT_SEED`]) and `B` zero.
    ///
    /// # Panics
    /// Where [`Self::try_new`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Self {
        or_panic(Self::try_new(base_weight, d_out, d_in, rank, alpha))
    }

    /// Like [`Self::new`], but returns errors.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if there are not `d_out * d_in` weights; [`Error::NotFinite`] if one of them is NaN or
    /// infinite; [`Error::RankZero`] if `rank` is 0; [`Error::Alpha`] if alpha or the scale is NaN or infinite;
    /// [`Error::Shape`] if the number of elements of a matrix does not fit in `usize`; [`Error::OutOfMemory`].
    pub fn try_new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Result<Self, Error> {
        Self::fresh(base_weight, d_out, d_in, rank, alpha, LoRAScaling::Standard)
    }

    /// Like [`Self::new`], with a choice of how alpha and rank give the scale.
    ///
    /// # Panics
    /// Where [`Self::try_new`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn new_with_scaling(
        base_weight: Tensor,
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f32,
        scaling: LoRAScaling,
    ) -> Self {
        or_panic(Self::fresh(base_weight, d_out, d_in, rank, alpha, scaling))
    }

    fn fresh(
        base_weight: Tensor,
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f32,
        scaling: LoRAScaling,
    ) -> Result<Self, Error> {
        check_matrix("base weight", base_weight.data(), d_out, d_in)?;
        let adapter = LoRAAdapter::new(d_out, d_in, rank, alpha.into(), scaling, DEFAULT_SEED)?;
        Self::from_parts(base_weight, adapter)
    }

    /// Joins a base weight, row-major, and an adapter, whose shape `[d_out, d_in]` it must have.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if `base_weight` does not have `d_out * d_in` values; [`Error::NotFinite`] if one of them
    /// is NaN or infinite; and [those of all layers](crate#errors).
    pub fn from_parts(base_weight: Tensor, adapter: LoRAAdapter) -> Result<Self, Error> {
        let (d_out, d_in) = (adapter.d_out(), adapter.d_in());
        check_matrix("base weight", base_weight.data(), d_out, d_in)?;
        check_finite("base weight", base_weight.data())?;
        let frozen = Frozen { weight: base_weight, d_out, d_in, executor: Executor::detect() };
        let adapter = Joined::new(adapter, &frozen.base())?;
        Ok(Self { frozen, merged: None, bias: None, adapter })
    }

    /// Sets the bias, `[d_out]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `bias` does not have `d_out` values; [`Error::NotFinite`] if one of them is NaN or infinite.
    pub fn with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        Ok(Self { bias: Some(checked_bias(bias, self.frozen.d_out)?), ..self })
    }

    /// Sets the kernels; without this, those of [`Kernels::detect`]. They change the speed, never a bit.
    #[must_use]
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.frozen.executor.kernels = kernels;
        self
    }

    /// Sets the threads on which large operations run. They change the speed, never a bit.
    #[cfg(target_has_atomic = "ptr")]
    #[must_use]
    pub fn with_threads(mut self, threads: Arc<dyn Threads>) -> Self {
        self.frozen.executor.set_threads(threads);
        self
    }

    /// The frozen weight, row-major and never merged, the bias, and the adapter.
    #[must_use]
    pub fn into_parts(self) -> (Tensor, Option<Vec<f32>>, LoRAAdapter) {
        (self.frozen.weight, self.bias.map(<[f32]>::into_vec), self.adapter.into_adapter())
    }
}

/// Merge.
impl LoRALayer {
    /// Adds `scale * B A` to the weight and, with `DoRA`, scales its rows, all in f64 and rounded once to f32. Does nothing
    /// if the layer is merged already.
    ///
    /// While merged, the layer holds both the original and the merged weight, 8 bytes per weight, so that
    /// [`Self::unmerge`] is exact. If `A` or `B` change while merged, that has no effect until the next merge.
    ///
    /// # Panics
    /// If the adapter, or one of its tensors, was replaced by one that does not fit, or if there is no memory for the
    /// merged weight.
    #[doc(alias("merge_adapter", "merge_and_unload"))]
    #[track_caller]
    pub fn merge(&mut self) {
        if self.merged.is_none() {
            self.merged = Some(or_panic(self.merge_weight()));
        }
    }

    fn merge_weight(&self) -> Result<Tensor, Error> {
        let pair = self.adapter.pair(&self.frozen.base())?;
        let mut merged = copy(self.frozen.weight.data())?;
        let rows = merged.chunks_exact_mut(self.frozen.d_in.max(1));
        rows.enumerate().for_each(|(row, weights)| pair.merge_row(row, weights));
        Ok(Tensor::from_vec(merged, false))
    }

    /// Undoes [`Self::merge`]: the weight is again what it was before, bit for bit.
    #[doc(alias = "unmerge_adapter")]
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the adapter is merged into the weight.
    #[must_use]
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }
}

adapter_accessors!(LoRALayer);

/// Accessors.
impl LoRALayer {
    /// The weight that [`Self::forward`] multiplies by, row-major `[d_out, d_in]`: `W`, or while merged `W + scale * B A`.
    #[must_use]
    pub fn base_weight(&self) -> &Tensor {
        self.merged.as_ref().unwrap_or(&self.frozen.weight)
    }

    /// The bias, `[d_out]`, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Number of outputs.
    #[must_use]
    pub fn d_out(&self) -> usize {
        self.frozen.d_out
    }

    /// Number of inputs.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.frozen.d_in
    }
}
