//! `LoRA` on a dense base weight.

use alloc::vec::Vec;

use nf4_kernels::Kernels;

use crate::adapter::{DEFAULT_SEED, LoRAAdapter, LoRAScaling};
use crate::error::{Error, check_finite, check_len, check_matrix, or_panic};
use crate::tensor::Tensor;

/// A linear layer with a dense, frozen base weight `W` `[d_out, d_in]` and a `LoRA` adapter: `y = W x + scale * B (A x)`.
///
/// All arithmetic is f32 (a merge: f64, rounded once), with the same bits on each machine.
#[derive(Debug, Clone)]
pub struct LoRALayer {
    base: Tensor,
    /// `W + scale * B A` while merged. `base` stays as it was, so that it can come back bit for bit: subtracting would round.
    merged: Option<Tensor>,
    adapter: LoRAAdapter,
}

impl LoRALayer {
    /// A layer with a fresh adapter of scale `alpha / rank`: `A` as by [`LoRAAdapter::try_init`] with [`DEFAULT_SEED`], `B`
    /// zero. `base_weight` is row-major `[d_out, d_in]`.
    ///
    /// # Panics
    /// Where [`Self::try_new`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Self {
        or_panic(Self::try_new(base_weight, d_out, d_in, rank, alpha))
    }

    /// As [`Self::new`].
    ///
    /// # Errors
    /// Those of [`LoRAAdapter::try_init`] and [`Self::try_from_adapter`].
    pub fn try_new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Result<Self, Error> {
        Self::try_new_with_scaling(base_weight, d_out, d_in, rank, alpha, LoRAScaling::Standard)
    }

    /// As [`Self::new`], with a choice of how alpha and rank give the scale.
    ///
    /// # Panics
    /// Where [`Self::try_new_with_scaling`] gives an error.
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
        or_panic(Self::try_new_with_scaling(base_weight, d_out, d_in, rank, alpha, scaling))
    }

    /// As [`Self::new_with_scaling`].
    ///
    /// # Errors
    /// Those of [`LoRAAdapter::try_init`] and [`Self::try_from_adapter`].
    pub fn try_new_with_scaling(
        base_weight: Tensor,
        d_out: usize,
        d_in: usize,
        rank: usize,
        alpha: f32,
        scaling: LoRAScaling,
    ) -> Result<Self, Error> {
        check_matrix("base weight", base_weight.data(), d_out, d_in)?;
        Self::try_from_adapter(base_weight, LoRAAdapter::try_init(d_out, d_in, rank, alpha, scaling, DEFAULT_SEED)?)
    }

    /// A layer from a base weight, row-major, and an adapter, which gives the shape: for given `A` and `B`, or another seed.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if `base_weight` does not have `d_out * d_in` values; [`Error::NotFinite`] if one is NaN or
    /// infinite.
    pub fn try_from_adapter(base_weight: Tensor, adapter: LoRAAdapter) -> Result<Self, Error> {
        check_matrix("base weight", base_weight.data(), adapter.d_out(), adapter.d_in())?;
        check_finite("base weight", base_weight.data())?;
        Ok(Self { base: base_weight, merged: None, adapter })
    }

    /// `y = W x + scale * B (A x)`; while merged `y = W' x` with the merged weight. `x` has `d_in` values, `y` `d_out`.
    ///
    /// A NaN or infinity in `x` gives what IEEE 754 says; every NaN in `y` is [`f32::NAN`].
    ///
    /// # Panics
    /// Where [`Self::try_forward`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        or_panic(self.try_forward(x))
    }

    /// As [`Self::forward`].
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values.
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        check_len("input", self.d_in(), x.len())?;
        let kernels = Kernels::detect();
        let mut y = Tensor::zeros(self.d_out(), false);
        kernels.gemv_dense(self.base_weight().data(), x.data(), y.data_mut())?;
        if !self.is_merged() {
            let mut low_rank = alloc::vec![0.0; self.rank()];
            self.adapter.add_product(kernels, x.data(), &mut low_rank, y.data_mut())?;
        }
        Ok(y)
    }

    /// Adds `scale * B A` to the weight, each sum rounded once from f64 to f32. Does nothing if merged already.
    ///
    /// While merged the layer holds both weights, 8 bytes for each of them: [`Self::unmerge`] is then exact. Changes of `A` or
    /// `B` while merged count from the next merge on.
    pub fn merge(&mut self) {
        if self.merged.is_none() {
            let mut merged = Tensor::from_vec(self.base.data().to_vec(), false);
            self.adapter.add_to_rows(0, merged.data_mut());
            self.merged = Some(merged);
        }
    }

    /// Takes the adapter out of the weight: it is what it was before [`Self::merge`], bit for bit.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// The frozen weight, never merged, and the adapter.
    pub(crate) fn into_parts(self) -> (Tensor, LoRAAdapter) {
        (self.base, self.adapter)
    }
}

/// What it is.
impl LoRALayer {
    /// The weight that [`Self::forward`] multiplies by, row-major `[d_out, d_in]`: `W`, and while merged `W + scale * B A`.
    #[must_use]
    pub fn base_weight(&self) -> &Tensor {
        self.merged.as_ref().unwrap_or(&self.base)
    }

    /// `A`, `[rank, d_in]` row-major.
    #[must_use]
    pub fn lora_a(&self) -> &Tensor {
        self.adapter.a()
    }

    /// `A`, to be changed.
    pub fn lora_a_mut(&mut self) -> &mut Tensor {
        self.adapter.a_mut()
    }

    /// `B`, `[d_out, rank]` row-major.
    #[must_use]
    pub fn lora_b(&self) -> &Tensor {
        self.adapter.b()
    }

    /// `B`, to be changed.
    pub fn lora_b_mut(&mut self) -> &mut Tensor {
        self.adapter.b_mut()
    }

    /// `A` and `B`, to be trained.
    pub fn trainable_params(&mut self) -> Vec<&mut Tensor> {
        self.adapter.trainable_params()
    }

    /// The adapter.
    #[must_use]
    pub fn adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// Whether the adapter is added to the weight.
    #[must_use]
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The rank of the adapter.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.adapter.rank()
    }

    /// The factor of the adapter.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.adapter.scale()
    }

    /// Outputs.
    #[must_use]
    pub fn d_out(&self) -> usize {
        self.adapter.d_out()
    }

    /// Inputs.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.adapter.d_in()
    }
}
