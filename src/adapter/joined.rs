//! An adapter on a base: the norms of the adapted rows, which `DoRA` needs.
//!
//! With `V = W + scale * B A` and the magnitude `m`, `[d_out]`, the weight of row `r` is `g[r] V[r]` with the gain
//! `g[r] = m[r] / |V[r]|`, the Euclidean norm. As in the paper and in PEFT the norm counts as a constant in the
//! gradient.
//!
//! A norm depends on the base, on `A` and on `B`, and takes a pass over the packed weights: each row is dequantized alone,
//! `V[r]` and the sum of its squares are f64, and the norm is rounded to f32. So norms are kept, and are stale once
//! [`Joined::adapter_mut`] has given access to the adapter. A forward then fails until they are recomputed; a backward,
//! which takes `&mut self`, recomputes them.

use alloc::vec::Vec;
use core::ops::Range;

use crate::adapter::lora::LoRAAdapter;
use crate::adapter::pair::{Pair, gain};
use crate::buffer::{copy, grow, zeros};
use crate::error::Error;
use crate::round::to_f32;
use crate::weight::base::Base;

/// An adapter that has joined a base.
#[derive(Debug, Clone)]
pub(crate) struct Joined {
    adapter: LoRAAdapter,
    /// `|V[r]|`, with `DoRA` only.
    norms: Vec<f32>,
    /// `g[r]`, with `DoRA` only.
    gains: Vec<f32>,
    stale: bool,
}

/// An adapter in a forward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fresh<'a> {
    pub(crate) pair: Pair<'a>,
    /// The gains of the rows, with `DoRA`.
    pub(crate) gains: Option<&'a [f32]>,
}

impl Joined {
    /// Joins an adapter to a base, and computes its norms.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if they differ in shape; [`Error::MatrixLength`] or [`Error::Shape`] if a tensor has another
    /// length; [`Error::OutOfMemory`].
    pub(crate) fn new(adapter: LoRAAdapter, base: &Base<'_>) -> Result<Self, Error> {
        let mut joined = Self { adapter, norms: Vec::new(), gains: Vec::new(), stale: true };
        joined.refresh(base)?;
        Ok(joined)
    }

    pub(crate) fn adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// The adapter, for changing or replacing it. Norms are stale afterwards.
    pub(crate) fn adapter_mut(&mut self) -> &mut LoRAAdapter {
        self.stale = true;
        &mut self.adapter
    }

    /// The adapter, for changes that no norm depends on.
    pub(crate) fn gradients_mut(&mut self) -> &mut LoRAAdapter {
        &mut self.adapter
    }

    pub(crate) fn into_adapter(self) -> LoRAAdapter {
        self.adapter
    }

    /// Bytes on the heap: the adapter, and with `DoRA` norms and gains.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.adapter.memory_bytes() + (self.norms.capacity() + self.gains.capacity()) * size_of::<f32>()
    }

    /// The adapter, for changes of gradients, its norms, and with `DoRA` its gains.
    pub(crate) fn parts_mut(&mut self) -> (&mut LoRAAdapter, &[f32], Option<&[f32]>) {
        let gains = self.adapter.is_dora().then_some(&*self.gains);
        (&mut self.adapter, &self.norms, gains)
    }

    /// The tensors of the adapter, if they fit the base.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the adapter was replaced by one of another shape; [`Error::MatrixLength`] or [`Error::Shape`]
    /// if a tensor was replaced by one of another length.
    pub(crate) fn pair(&self, base: &Base<'_>) -> Result<Pair<'_>, Error> {
        let (base, adapter) = ([base.d_out(), base.d_in()], [self.adapter.d_out(), self.adapter.d_in()]);
        if base == adapter { self.adapter.pair() } else { Err(Error::Mismatch { base, adapter }) }
    }

    /// The tensors of the adapter and its gains, for a forward.
    ///
    /// # Errors
    /// The errors of [`Self::pair`]; [`Error::StaleNorms`].
    pub(crate) fn fresh(&self, base: &Base<'_>) -> Result<Fresh<'_>, Error> {
        let pair = self.pair(base)?;
        match (self.adapter.is_dora(), self.stale) {
            (true, true) => Err(Error::StaleNorms),
            (dora, _) => Ok(Fresh { pair, gains: dora.then_some(&*self.gains) }),
        }
    }

    /// Recomputes the norms if they are stale, for which each thread allocates a row of the base.
    ///
    /// # Errors
    /// The errors of [`Self::pair`]; [`Error::OutOfMemory`].
    pub(crate) fn refresh(&mut self, base: &Base<'_>) -> Result<(), Error> {
        let work = self.pair(base)?.work(base.d_out().saturating_mul(base.d_in()));
        self.refresh_by(base, |pair, norms| {
            base.executor().by_rows(work, 0..norms.len(), 1, norms, &|rows: Range<usize>, norms: &mut [f32]| {
                set_norms(base, pair, rows, &mut zeros(1, base.d_in())?, norms)
            })
        })
    }

    /// Like [`Self::refresh`], but without an allocation once there are norms, on one thread and with a buffer for a row of the
    /// base, `[d_in]`.
    pub(crate) fn refresh_with(&mut self, base: &Base<'_>, row: &mut [f32]) -> Result<(), Error> {
        self.refresh_by(base, |pair, norms| set_norms(base, pair, 0..norms.len(), row, norms))
    }

    /// Recomputes what is stale, with norms from `compute`.
    fn refresh_by(
        &mut self,
        base: &Base<'_>,
        compute: impl FnOnce(&Pair<'_>, &mut [f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.pair(base)?;
        if !self.stale {
            return Ok(());
        }
        let rows = if self.adapter.is_dora() { base.d_out() } else { 0 };
        for buffer in [&mut self.norms, &mut self.gains] {
            buffer.truncate(rows);
            grow(buffer, rows)?;
        }
        if rows > 0 {
            compute(&self.adapter.pair()?, &mut self.norms)?;
        }
        self.adapter.take_norms(|| copy(&self.norms))?;
        let magnitude = self.adapter.magnitude().map_or(&[][..], |m| m.data());
        for ((gain, magnitude), norm) in self.gains.iter_mut().zip(magnitude).zip(&self.norms) {
            *gain = to_f32(self::gain(*magnitude, *norm));
        }
        self.stale = false;
        Ok(())
    }
}

/// The norms of some rows of the adapted weight, with a buffer for a row of the base.
fn set_norms(
    base: &Base<'_>,
    pair: &Pair<'_>,
    rows: Range<usize>,
    row: &mut [f32],
    norms: &mut [f32],
) -> Result<(), Error> {
    for (r, norm) in rows.zip(norms) {
        base.row(r, row)?;
        *norm = to_f32(pair.norm(r, row));
    }
    Ok(())
}
