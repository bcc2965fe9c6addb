//! `DoRA`: `LoRA` with a trained magnitude for each row of the adapted weight (Liu et al., "`DoRA`: Weight-Decomposed
//! Low-Rank Adaptation", 2024).
//!
//! With `V = W + scale * B A` and the magnitude `m`, `[d_out]`, the weight of row `r` is `g[r] V[r]` with the gain
//! `g[r] = m[r] / |V[r]|`, the Euclidean norm. As in the paper and in PEFT the norm counts as a constant in the
//! gradient.
//!
//! A norm depends on the base, on `A` and on `B`, and takes a pass over the packed weights: each row is restored
//! alone, `V[r]` and the sum of its squares are f64, and the norm is rounded to f32. So norms are kept, and are stale once `A`, `B` or the magnitude
//! may have changed, which every access that can change them marks. What needs them then is an error that says so,
//! until they are taken again; a backward, which may write, takes them itself.

use alloc::vec::Vec;

use crate::adapter::lora::{LoRAAdapter, to_f32};
use crate::buffer::zeros;
use crate::error::{Error, check_finite, check_len};
use crate::layer::qlora::QLoRALayer;
use crate::tensor::Tensor;
use crate::weight::base::Base;

/// What `DoRA` adds to an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Dora {
    /// `m`; none until the adapter meets its first base, whose norms it then gets.
    pub(crate) magnitude: Option<Tensor>,
    /// `|V[r]|`; none until the adapter meets a base.
    pub(crate) norms: Vec<f32>,
    /// `g[r]`, as many.
    pub(crate) gains: Vec<f32>,
    stale: bool,
}

impl Dora {
    pub(crate) fn memory_bytes(&self) -> usize {
        let norms = (self.norms.capacity() + self.gains.capacity()) * size_of::<f32>();
        self.magnitude.as_ref().map_or(0, Tensor::memory_bytes) + norms
    }
}

/// `m / norm`, and 0 for a row of zeros, whose product is 0 whatever the gain. The norm is rounded to f32, as the magnitude
/// is: so the gains of a fresh adapter are 1, also once it was stored, or joins its base again.
pub(crate) fn gain(magnitude: f32, norm: f32) -> f64 {
    if norm == 0.0 { 0.0 } else { f64::from(magnitude) / f64::from(norm) }
}

/// `DoRA`; see the paper: Liu et al., "Weight-Decomposed Low-Rank Adaptation", 2024.
impl LoRAAdapter {
    /// The same adapter with `DoRA`. The magnitude becomes the norms of the rows of the adapted weight when the
    /// adapter first joins a base, as in PEFT; so a fresh adapter changes nothing yet.
    #[must_use]
    pub fn with_dora(mut self) -> Self {
        self.dora = Some(Dora { magnitude: None, norms: Vec::new(), gains: Vec::new(), stale: true });
        self
    }

    /// The same adapter with `DoRA` and a given magnitude, `[d_out]`: PEFT's `lora_magnitude_vector`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `d_out` values; [`Error::NotFinite`] if one is NaN or infinite.
    pub fn try_with_magnitude(self, magnitude: Vec<f32>) -> Result<Self, Error> {
        check_len("lora_magnitude_vector", self.d_out(), magnitude.len())?;
        check_finite("lora_magnitude_vector", &magnitude)?;
        let mut adapter = self.with_dora();
        if let Some(dora) = &mut adapter.dora {
            dora.magnitude = Some(Tensor::from_vec(magnitude, true));
        }
        Ok(adapter)
    }

    /// Whether this is a `DoRA` adapter.
    #[must_use]
    pub fn is_dora(&self) -> bool {
        self.dora.is_some()
    }

    /// The magnitude, `[d_out]`; `None` without `DoRA`, and before an adapter of [`Self::with_dora`] has joined a base.
    #[must_use]
    pub fn magnitude(&self) -> Option<&Tensor> {
        self.dora.as_ref()?.magnitude.as_ref()
    }

    /// The magnitude, to be changed; its length must not. Norms are stale from here on.
    pub fn magnitude_mut(&mut self) -> Option<&mut Tensor> {
        self.norms_are_stale();
        self.dora.as_mut()?.magnitude.as_mut()
    }

    pub(crate) fn norms_are_stale(&mut self) {
        if let Some(dora) = &mut self.dora {
            dora.stale = true;
        }
    }

    /// The gains of the rows, if there are any.
    ///
    /// # Errors
    /// [`Error::StaleNorms`].
    pub(crate) fn gains(&self) -> Result<Option<&[f32]>, Error> {
        match &self.dora {
            Some(dora) if dora.stale => Err(Error::StaleNorms),
            dora => Ok(dora.as_ref().map(|dora| &*dora.gains)),
        }
    }

    /// Takes the norms of the adapted weight, for a base that the adapter has just joined.
    pub(crate) fn join(&mut self, base: Base<'_>) -> Result<(), Error> {
        self.norms_are_stale();
        let len = if self.is_dora() { self.d_in() } else { 0 };
        self.refresh(base, &mut zeros(1, len)?)
    }

    /// Takes the norms again if they are stale. `row` is scratch for a row of the base, `[d_in]` if there is `DoRA`.
    pub(crate) fn refresh(&mut self, base: Base<'_>, row: &mut [f32]) -> Result<(), Error> {
        let rows = self.d_out();
        if let Some(dora) = self.dora.as_mut().filter(|dora| dora.norms.len() != rows) {
            (dora.norms, dora.gains) = (zeros(1, rows)?, zeros(1, rows)?);
        }
        let Some(mut dora) = self.dora.take_if(|dora| dora.stale) else { return Ok(()) };
        let mut result = Ok(());
        for (r, (norm, gain)) in dora.norms.iter_mut().zip(&mut dora.gains).enumerate() {
            result = result.and_then(|()| base.row(r, row));
            *norm = to_f32(self.norm(r, row));
            let magnitude = dora.magnitude.as_ref().map_or(*norm, |m| m.data()[r]);
            *gain = to_f32(self::gain(magnitude, *norm));
        }
        dora.magnitude.get_or_insert_with(|| Tensor::from_vec(dora.norms.clone(), true));
        dora.stale = result.is_err();
        self.dora = Some(dora);
        result
    }
}

/// `DoRA`.
impl QLoRALayer {
    /// Takes the norms of the adapted weight again if they are stale; without `DoRA` it does nothing. To be called
    /// after [`Self::trainable_params`], [`Self::lora_a_mut`], [`Self::lora_b_mut`] or [`Self::lora_magnitude_mut`]
    /// and before the next forward, which is otherwise [`Error::StaleNorms`]: in training, after each step of the
    /// optimizer.
    ///
    /// It takes `d_out * d_in * rank` multiply-adds in f64, and allocates one row.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] or [`Error::Shape`] if `A`, `B` or the magnitude was replaced by a tensor of another
    /// length.
    pub fn refresh_dora(&mut self) -> Result<(), Error> {
        self.adapter.check()?;
        let mut row = zeros(1, if self.adapter.is_dora() { self.d_in() } else { 0 })?;
        self.adapter.refresh(self.linear.base(), &mut row)
    }

    /// The magnitude of `DoRA`, `[d_out]`, if there is one.
    #[must_use]
    pub fn lora_magnitude(&self) -> Option<&Tensor> {
        self.adapter.magnitude()
    }

    /// The magnitude of `DoRA`, to be changed; see [`Self::refresh_dora`].
    pub fn lora_magnitude_mut(&mut self) -> Option<&mut Tensor> {
        self.adapter.magnitude_mut()
    }
}
