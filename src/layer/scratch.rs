//! Working memory of a forward.

use alloc::vec::Vec;

use nf4_kernels::BlockSize;

use crate::buffer::{grow, take};
use crate::error::Error;
use crate::weight::inputs::InputsBuf;

/// Working memory for forwards that do not allocate; any number of forwards and layers can use it in turn.
///
/// For each vector of a batch, a layer `[d_out, d_in]` with adapters of rank `r` needs
///
/// * the inputs in f32 and quantized ([`InputsBuf::bytes`]),
/// * `r` f32 for the low-rank products,
/// * `d_out` f32 for the outputs before they are rounded.
///
/// [`Self::bytes`] adds these up. A forward reads nothing that an earlier one left behind.
///
/// One scratch for all layers of a model, large enough for each of them:
///
/// ```
/// use nf4::{QLoRALayer, Scratch, Tensor};
/// let layer = |d_out, d_in| QLoRALayer::new(Tensor::zeros(d_out * d_in, false), d_out, d_in, 8, 16.0);
/// let (up, down) = (layer(256, 64), layer(64, 256));
///
/// let (batch, mut scratch) = (4, Scratch::new());
/// for layer in [&up, &down] {
///     let block_size = layer.base_weight_quantized().block_size();
///     scratch.reserve(layer.d_out(), layer.d_in(), block_size, layer.rank(), batch)?;
/// }
///
/// // From here on, nothing is allocated.
/// let (x, mut hidden, mut y) = ([1.0; 4 * 64], [0.0; 4 * 256], [0.0; 4 * 64]);
/// up.forward_into(&x, &mut scratch, &mut hidden)?;
/// down.forward_into(&hidden, &mut scratch, &mut y)?;
/// # Ok::<(), nf4::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    pub(crate) inputs: InputsBuf,
    pub(crate) work: Work,
}

impl Scratch {
    /// An empty scratch, to be grown by [`Self::reserve`]. [`QLoRALayer::scratch`] makes one for a layer.
    ///
    /// [`QLoRALayer::scratch`]: crate::QLoRALayer::scratch
    #[must_use]
    pub const fn new() -> Self {
        Self { inputs: InputsBuf::new(), work: Work { low_rank: Vec::new(), product: Vec::new() } }
    }

    /// Grows the scratch, if necessary, for batches of `batch` vectors on a layer `[d_out, d_in]` of this block size.
    /// `rank` is the sum of the ranks of all adapters that a vector uses.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; parts of the scratch may have grown.
    pub fn reserve(
        &mut self,
        d_out: usize,
        d_in: usize,
        block_size: BlockSize,
        rank: usize,
        batch: usize,
    ) -> Result<(), Error> {
        self.inputs.reserve(d_in, block_size, batch)?;
        self.work.reserve(d_out, rank, batch)
    }

    /// The bytes that [`Self::reserve`] takes with these arguments; `usize::MAX` if there are more.
    #[must_use]
    pub const fn bytes(d_out: usize, d_in: usize, block_size: BlockSize, rank: usize, batch: usize) -> usize {
        let work = rank.saturating_add(d_out).saturating_mul(batch).saturating_mul(size_of::<f32>());
        work.saturating_add(InputsBuf::bytes(d_in, block_size, batch))
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let floats = self.work.low_rank.capacity() + self.work.product.capacity();
        self.inputs.memory_bytes() + floats * size_of::<f32>()
    }
}

/// All of [`Scratch`] but the inputs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Work {
    low_rank: Vec<f32>,
    product: Vec<f32>,
}

impl Work {
    pub(crate) fn reserve(&mut self, d_out: usize, rank: usize, batch: usize) -> Result<(), Error> {
        grow(&mut self.low_rank, rank.saturating_mul(batch))?;
        grow(&mut self.product, d_out.saturating_mul(batch))
    }

    /// `A x` of each adapter, `[batch, rank]`, and the base product, `[d_out, batch]`.
    pub(crate) fn buffers(
        &mut self,
        d_out: usize,
        rank: usize,
        batch: usize,
    ) -> Result<(&mut [f32], &mut [f32]), Error> {
        Ok((
            take("scratch for the low-rank product", &mut self.low_rank, rank.saturating_mul(batch))?,
            take("scratch for the base product", &mut self.product, d_out.saturating_mul(batch))?,
        ))
    }
}
