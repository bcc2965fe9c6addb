//! `LoRA` on a dense base weight.

use alloc::boxed::Box;
use alloc::vec::Vec;

use nf4_kernels::{Float, Kernels};

use crate::adapter::backward::BackwardScratch;
use crate::adapter::lora::{DEFAULT_SEED, LoRAAdapter, LoRAScaling};
use crate::buffer::zeros;
use crate::error::{Error, check_finite, check_len, check_matrix, or_panic};
use crate::tensor::Tensor;
use crate::weight::base::Base;

/// A linear layer with a dense, frozen base weight `W` `[d_out, d_in]`, a `LoRA` adapter and, if
/// [`Self::try_with_bias`] gave it one, a frozen bias: `y = W x + scale * B (A x) + bias`; with `DoRA` (see
/// [`LoRAAdapter`]) each row of the sum of the first two is scaled.
///
/// All arithmetic is f32 (a merge and norms: f64, rounded once), with the same bits on each machine.
#[derive(Debug, Clone)]
pub struct LoRALayer {
    base: Tensor,
    /// `W + scale * B A` while merged. `base` stays as it was, so that it can come back bit for bit: subtracting
    /// would round.
    merged: Option<Tensor>,
    bias: Option<Box<[f32]>>,
    adapter: LoRAAdapter,
}

impl LoRALayer {
    /// A layer with a fresh adapter of scale `alpha / rank`: `A` as by [`LoRAAdapter::try_init`] with
    /// [`DEFAULT_SEED`], `B` zero. `base_weight` is row-major `[d_out, d_in]`.
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

    /// A layer from a base weight, row-major, and an adapter, which gives the shape: for given `A` and `B`, or
    /// another seed.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if `base_weight` does not have `d_out * d_in` values; [`Error::NotFinite`] if one is
    /// NaN or infinite; [`Error::MatrixLength`] also if the tensors of the adapter were replaced by others.
    pub fn try_from_adapter(base_weight: Tensor, mut adapter: LoRAAdapter) -> Result<Self, Error> {
        check_matrix("base weight", base_weight.data(), adapter.d_out(), adapter.d_in())?;
        check_finite("base weight", base_weight.data())?;
        adapter.check()?;
        adapter.join(Base::Dense(base_weight.data(), Kernels::detect()))?;
        Ok(Self { base: base_weight, merged: None, bias: None, adapter })
    }

    /// The same layer with a bias, `[d_out]`, instead of the one that it had, if any.
    ///
    /// # Errors
    /// [`Error::Shape`] if `bias` does not have `d_out` values; [`Error::NotFinite`] if one is NaN or infinite.
    pub fn try_with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        check_len("bias", self.d_out(), bias.len())?;
        check_finite("bias", &bias)?;
        Ok(Self { bias: Some(bias.into_boxed_slice()), ..self })
    }

    /// `y = W x + scale * B (A x) + bias`; while merged `y = W' x + bias` with the merged weight. `x` has `d_in`
    /// values, `y` `d_out`.
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
    /// [`Error::Shape`] if `x` does not have `d_in` values; [`Error::MatrixLength`] if `A` or `B` was replaced by a
    /// tensor of another length; [`Error::StaleNorms`] with `DoRA`, see [`Self::refresh_dora`].
    pub fn try_forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        check_len("input", self.d_in(), x.len())?;
        let kernels = Kernels::detect();
        let mut y = Tensor::try_zeros(1, self.d_out())?;
        kernels.gemv_dense(self.base_weight().data(), x.data(), y.data_mut())?;
        if !self.is_merged() {
            self.adapter.check()?;
            let mut low_rank = zeros(1, self.rank())?;
            self.adapter.add_product(kernels, x.data(), &mut low_rank, y.data_mut())?;
            if let Some(gains) = self.adapter.gains()? {
                y.data_mut().iter_mut().zip(gains).for_each(|(y, g)| *y = f32::from_f32(*y * g));
            }
        }
        if let Some(bias) = &self.bias {
            y.data_mut().iter_mut().zip(bias).for_each(|(y, b)| *y = f32::from_f32(*y + b));
        }
        Ok(y)
    }

    /// Adds `scale * B A` to the weight, with `DoRA` also scales its rows: all in f64, rounded once to f32. Does
    /// nothing if merged already.
    ///
    /// While merged the layer holds both weights, 8 bytes for each of them: [`Self::unmerge`] is then exact. Changes
    /// of `A` or `B` while merged count from the next merge on.
    ///
    /// # Panics
    /// If `A`, `B` or the magnitude was replaced by a tensor of another length.
    #[track_caller]
    pub fn merge(&mut self) {
        if self.merged.is_none() {
            or_panic(self.adapter.check());
            let mut merged = Tensor::from_vec(self.base.data().to_vec(), false);
            let rows = merged.data_mut().chunks_exact_mut(self.adapter.d_in().max(1));
            rows.enumerate().for_each(|(row, weights)| self.adapter.merge_row(row, weights));
            self.merged = Some(merged);
        }
    }

    /// Takes the adapter out of the weight: it is what it was before [`Self::merge`], bit for bit.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Takes the norms of the adapted weight again if they are stale; without `DoRA` it does nothing. To be called
    /// after [`Self::trainable_params`] or another access that can change the adapter, and before the next forward.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] or [`Error::Shape`] if `A`, `B` or the magnitude was replaced by a tensor of another
    /// length.
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.check()?;
        let mut row = zeros(1, self.d_in())?;
        self.adapter.refresh(Base::Dense(self.base.data(), Kernels::detect()), &mut row)
    }

    /// Adds the gradients of the adapter for inputs `x` `[batch, d_in]` and upstream gradients `dy` `[batch, d_out]`
    /// to those of its tensors, and returns that of the input. All as [`crate::QLoRALayer::backward`]; whether the
    /// layer is merged does not matter.
    ///
    /// # Panics
    /// Where [`Self::try_backward`] gives an error.
    #[track_caller]
    pub fn backward(&mut self, x: &Tensor, dy: &Tensor) -> Tensor {
        or_panic(self.try_backward(x, dy))
    }

    /// As [`Self::backward`].
    ///
    /// # Errors
    /// As [`crate::QLoRALayer::try_backward`].
    pub fn try_backward(&mut self, x: &Tensor, dy: &Tensor) -> Result<Tensor, Error> {
        let batch = self.adapter.check_gradients(x.data(), dy.data())?;
        let (mut scratch, mut dx) = (BackwardScratch::new(), Tensor::try_zeros(1, x.len())?);
        scratch.try_reserve(self.d_out(), self.d_in(), self.rank(), batch)?;
        let base = Base::Dense(self.base.data(), Kernels::detect());
        self.adapter.backward(base, x.data(), dy.data(), &mut scratch, Some(dx.data_mut()))?;
        Ok(dx)
    }

    /// Sets the gradients of the adapter to zero, keeping their memory for the next step.
    pub fn zero_grad(&mut self) {
        self.adapter.zero_grad();
    }

    /// The frozen weight, never merged, the bias, and the adapter.
    pub(crate) fn into_parts(self) -> (Tensor, Option<Box<[f32]>>, LoRAAdapter) {
        (self.base, self.bias, self.adapter)
    }
}

/// What it is.
impl LoRALayer {
    /// The weight that [`Self::forward`] multiplies by, row-major `[d_out, d_in]`: `W`, and while merged `W + scale *
    /// B A`.
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

    /// `A`, `B` and, with `DoRA`, the magnitude, to be trained.
    pub fn trainable_params(&mut self) -> Vec<&mut Tensor> {
        self.adapter.trainable_params()
    }

    /// The adapter.
    #[must_use]
    pub fn adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// The bias, `[d_out]`, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
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
