//! Working memory of a forward.

use alloc::vec::Vec;

use nf4_kernels::{Activations, BlockSize, ShapeError};

use crate::buffer::grow;
use crate::error::{Error, or_panic};

/// Working memory of the forwards that end in `_into`, made once and used for any number of forwards and layers.
///
/// For each vector of a batch, a layer `[d_out, d_in]` with adapters of rank `r` needs
///
/// * [`Activations::values_len`] `i16`: `d_in` rounded up to a multiple of 64,
/// * [`Activations::scales_len`] f32: `d_in / 64` (`d_in / 32` with block size 32); these two are 0 if `d_in` is not a
///   multiple of 64 (32 with block size 32),
/// * `r` f32,
/// * `d_out` f32,
///
/// which [`Self::bytes`] adds up; and for inputs that are not f32 (`_as`) `d_in` f32 more. A forward leaves nothing in
/// it that the next one reads.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    inputs: Vec<f32>,
    work: Work,
}

impl Scratch {
    /// Scratch that is too small for any layer yet; see [`Self::reserve`] and [`crate::QLoRALayer::scratch`].
    #[must_use]
    pub const fn new() -> Self {
        let work = Work { values: Vec::new(), scales: Vec::new(), low_rank: Vec::new(), product: Vec::new() };
        Self { inputs: Vec::new(), work }
    }

    /// Grows, if need be, so that layers with these numbers fit as well as those before. `shape` is `[d_out, d_in]`,
    /// `rank` the sum of the ranks of the adapters that a vector meets.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[track_caller]
    pub fn reserve(&mut self, shape: [usize; 2], block_size: BlockSize, rank: usize, batch: usize) {
        or_panic(self.try_reserve(shape, block_size, rank, batch));
    }

    /// As [`Self::reserve`].
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit in memory. Parts of it may have grown then.
    pub fn try_reserve(
        &mut self,
        shape: [usize; 2],
        block_size: BlockSize,
        rank: usize,
        batch: usize,
    ) -> Result<(), Error> {
        let need = Need::new(shape, block_size, rank, batch);
        grow(&mut self.work.values, need.values)?;
        grow(&mut self.work.scales, need.scales)?;
        grow(&mut self.work.low_rank, need.low_rank)?;
        Ok(grow(&mut self.work.product, need.product)?)
    }

    /// Grows, if need be, so that `batch` vectors of `d_in` inputs can be converted to f32: for the forwards that end
    /// in `_as`.
    ///
    /// # Panics
    /// If it does not fit in memory.
    #[track_caller]
    pub fn reserve_inputs(&mut self, d_in: usize, batch: usize) {
        or_panic(self.try_reserve_inputs(d_in, batch));
    }

    /// As [`Self::reserve_inputs`].
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not fit in memory.
    pub fn try_reserve_inputs(&mut self, d_in: usize, batch: usize) -> Result<(), Error> {
        Ok(grow(&mut self.inputs, d_in.saturating_mul(batch))?)
    }

    /// Bytes that [`Self::reserve`] with these numbers takes; `usize::MAX` if there are more.
    #[must_use]
    pub const fn bytes(shape: [usize; 2], block_size: BlockSize, rank: usize, batch: usize) -> usize {
        let need = Need::new(shape, block_size, rank, batch);
        let floats = need.scales.saturating_add(need.low_rank).saturating_add(need.product);
        need.values.saturating_mul(size_of::<i16>()).saturating_add(floats.saturating_mul(size_of::<f32>()))
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let Work { values, scales, low_rank, product } = &self.work;
        let floats = scales.capacity() + low_rank.capacity() + product.capacity() + self.inputs.capacity();
        values.capacity() * size_of::<i16>() + floats * size_of::<f32>()
    }

    /// What a forward on f32 needs.
    pub(crate) fn work(&mut self) -> &mut Work {
        &mut self.work
    }

    /// The buffer for inputs that are converted to f32, and what a forward on them needs.
    pub(crate) fn inputs(&mut self, len: usize) -> Result<(&mut [f32], &mut Work), Error> {
        Ok((take("scratch for converted inputs", &mut self.inputs, len)?, &mut self.work))
    }
}

/// All of [`Scratch`] but the converted inputs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Work {
    values: Vec<i16>,
    scales: Vec<f32>,
    low_rank: Vec<f32>,
    product: Vec<f32>,
}

/// The parts of [`Work`] at their exact lengths.
#[derive(Debug)]
pub(crate) struct Buffers<'a> {
    /// Quantized activations, `[batch, values_len]`.
    pub(crate) values: &'a mut [i16],
    /// Their scales, `[batch, scales_len]`.
    pub(crate) scales: &'a mut [f32],
    /// `A x` of each adapter, `[batch, rank]`.
    pub(crate) low_rank: &'a mut [f32],
    /// The base product, `[d_out, batch]`.
    pub(crate) product: &'a mut [f32],
}

impl Work {
    pub(crate) fn buffers(
        &mut self,
        shape: [usize; 2],
        block_size: BlockSize,
        rank: usize,
        batch: usize,
    ) -> Result<Buffers<'_>, Error> {
        let need = Need::new(shape, block_size, rank, batch);
        Ok(Buffers {
            values: take("scratch for activation values", &mut self.values, need.values)?,
            scales: take("scratch for activation scales", &mut self.scales, need.scales)?,
            low_rank: take("scratch for the low-rank product", &mut self.low_rank, need.low_rank)?,
            product: take("scratch for the base product", &mut self.product, need.product)?,
        })
    }
}

/// The lengths of the parts of [`Work`].
struct Need {
    values: usize,
    scales: usize,
    low_rank: usize,
    product: usize,
}

impl Need {
    const fn new(shape: [usize; 2], block_size: BlockSize, rank: usize, batch: usize) -> Self {
        let [d_out, d_in] = shape;
        Self {
            values: Activations::values_len(d_in, block_size).saturating_mul(batch),
            scales: Activations::scales_len(d_in, block_size).saturating_mul(batch),
            low_rank: rank.saturating_mul(batch),
            product: d_out.saturating_mul(batch),
        }
    }
}

fn take<'a, T>(what: &'static str, buffer: &'a mut [T], len: usize) -> Result<&'a mut [T], Error> {
    let got = buffer.len();
    buffer.get_mut(..len).ok_or(ShapeError::Length { what, expected: len, got }.into())
}
