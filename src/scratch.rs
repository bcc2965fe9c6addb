//! Working memory of a forward.

use alloc::vec::Vec;

use nf4_kernels::{Activations, BlockSize, ShapeError};

use crate::error::Error;

/// Working memory of [`crate::QLoRALayer::forward_into`], made once and used for any number of forwards and layers.
///
/// A layer `[d_out, d_in]` of rank `r` needs [`Activations::values_len`] `i16` (`d_in` rounded up to a multiple of 64),
/// [`Activations::scales_len`] f32 (`d_in / 64`) and `r` f32; the first two are 0 if `d_in` is not a multiple of 64 (32
/// with block size 32). It does not depend on `d_out`. A forward leaves nothing in it that the next one reads.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    values: Vec<i16>,
    scales: Vec<f32>,
    low_rank: Vec<f32>,
}

impl Scratch {
    /// Scratch that is too small for any layer yet; see [`Self::reserve`] and [`crate::QLoRALayer::scratch`].
    #[must_use]
    pub const fn new() -> Self {
        Self { values: Vec::new(), scales: Vec::new(), low_rank: Vec::new() }
    }

    /// Grows, if need be, so that layers with these numbers fit as well as those before.
    pub fn reserve(&mut self, d_in: usize, block_size: BlockSize, rank: usize) {
        grow(&mut self.values, Activations::values_len(d_in, block_size));
        grow(&mut self.scales, Activations::scales_len(d_in, block_size));
        grow(&mut self.low_rank, rank);
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.values.capacity() * size_of::<i16>()
            + (self.scales.capacity() + self.low_rank.capacity()) * size_of::<f32>()
    }

    /// The buffers for quantized activations: values and scales.
    pub(crate) fn activations(
        &mut self,
        d_in: usize,
        block_size: BlockSize,
    ) -> Result<(&mut [i16], &mut [f32]), Error> {
        let values = take("scratch for activation values", &mut self.values, Activations::values_len(d_in, block_size));
        let scales = take("scratch for activation scales", &mut self.scales, Activations::scales_len(d_in, block_size));
        Ok((values?, scales?))
    }

    /// The buffer for `A x`.
    pub(crate) fn low_rank(&mut self, rank: usize) -> Result<&mut [f32], Error> {
        take("scratch for the low-rank product", &mut self.low_rank, rank)
    }
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
}

fn take<'a, T>(what: &'static str, buffer: &'a mut [T], len: usize) -> Result<&'a mut [T], Error> {
    let got = buffer.len();
    buffer.get_mut(..len).ok_or(ShapeError::Length { what, expected: len, got }.into())
}
