//! Inputs of products, prepared once for any number of weights.

use alloc::vec::Vec;

use nf4_kernels::{Activations, BlockSize, Float, Kernels};

use crate::buffer::{grow, take};
use crate::error::Error;

/// How a forward multiplies by the base weight. Adapters and bias are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// The 16x4 product: a codebook of 16 bits times activations of 14 bits with an f32 scale per 64. It is about as
    /// precise as f16 activations, and the faster one. Where blocks straddle rows it is the f32 product. See
    /// [`nf4_kernels::spec`].
    #[default]
    SixteenByFour,
    /// The f32 product: f32 codebook, f32 activations. See [`nf4_kernels::spec`].
    F32,
}

impl Arithmetic {
    /// The name as in the specification: `16x4`, `f32`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SixteenByFour => "16x4",
            Self::F32 => "f32",
        }
    }
}

/// Buffers for inputs that are converted and quantized once and used by several layers, such as the projections of one
/// attention block.
///
/// ```
/// use nf4::{InputsBuf, QLoRALayer, Tensor};
/// let new = || QLoRALayer::new(Tensor::from_vec(vec![0.5; 16 * 128], false), 16, 128, 4, 8.0);
/// let (q, k) = (new(), new());
///
/// let (mut buffers, mut scratch) = (InputsBuf::new(), q.scratch(1));
/// buffers.reserve(128, q.base_weight_quantized().block_size(), 1)?;
/// let x = q.quantize_inputs(&[1.0; 128], &mut buffers)?;
/// let mut y = [[0.0; 16]; 2];
/// q.forward_shared(&x, &mut scratch, &mut y[0])?;
/// k.forward_shared(&x, &mut scratch, &mut y[1])?;
/// # assert_eq!(y[0], y[1]);
/// # Ok::<(), nf4::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct InputsBuf {
    floats: Vec<f32>,
    values: Vec<i16>,
    scales: Vec<f32>,
}

impl InputsBuf {
    /// Buffers that are too small for any inputs; see [`Self::reserve`].
    #[must_use]
    pub const fn new() -> Self {
        Self { floats: Vec::new(), values: Vec::new(), scales: Vec::new() }
    }

    /// Grows the buffers, if need be, for batches of `batch` vectors of `d_in` inputs and weights of this block size.
    ///
    /// A vector takes 4 bytes per input for its f32 values, and, if `d_in` is a multiple of 64 (32 with block size 32),
    /// 2 bytes per input, rounded up to a multiple of 64, and 4 bytes per 64 (32) inputs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; some of the buffers may have grown.
    pub fn reserve(&mut self, d_in: usize, block_size: BlockSize, batch: usize) -> Result<(), Error> {
        let need = Need::new(d_in, block_size, batch);
        grow(&mut self.floats, need.floats)?;
        grow(&mut self.values, need.values)?;
        grow(&mut self.scales, need.scales)
    }

    /// Grows the buffer for f32 values alone.
    pub(crate) fn reserve_floats(&mut self, d_in: usize, batch: usize) -> Result<(), Error> {
        grow(&mut self.floats, d_in.saturating_mul(batch))
    }

    /// Bytes that [`Self::reserve`] with these arguments takes; `usize::MAX` if there are more.
    #[must_use]
    pub const fn bytes(d_in: usize, block_size: BlockSize, batch: usize) -> usize {
        let need = Need::new(d_in, block_size, batch);
        let floats = need.floats.saturating_add(need.scales).saturating_mul(size_of::<f32>());
        floats.saturating_add(need.values.saturating_mul(size_of::<i16>()))
    }

    /// Bytes on the heap.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        (self.floats.capacity() + self.scales.capacity()) * size_of::<f32>() + self.values.capacity() * size_of::<i16>()
    }

    /// Converts inputs `[batch, d_in]` to f32, exactly, and quantizes them for an arithmetic.
    pub(crate) fn prepare<X: Float>(
        &mut self,
        x: &[X],
        [batch, d_in]: [usize; 2],
        block_size: BlockSize,
        arithmetic: Arithmetic,
        kernels: Kernels,
    ) -> Result<Inputs<'_>, Error> {
        let need = Need::new(d_in, block_size, batch);
        let floats = convert(x, &mut self.floats, need.floats)?;
        let quantized = match arithmetic {
            Arithmetic::F32 => Quantized::No,
            Arithmetic::SixteenByFour => {
                let values = take("scratch for activation values", &mut self.values, need.values)?;
                let scales = take("scratch for activation scales", &mut self.scales, need.scales)?;
                let activations = kernels.quantize_activations_batch(floats, d_in, block_size, values, scales)?;
                Quantized::SixteenByFour(activations)
            }
        };
        Ok(Inputs { floats, batch, d_in, quantized })
    }

    /// Converts inputs `[batch, d_in]` to f32, exactly, for products with dense weights.
    pub(crate) fn convert<X: Float>(&mut self, x: &[X], [batch, d_in]: [usize; 2]) -> Result<Inputs<'_>, Error> {
        let floats = convert(x, &mut self.floats, batch.saturating_mul(d_in))?;
        Ok(Inputs { floats, batch, d_in, quantized: Quantized::No })
    }
}

/// Inputs as f32 in the first `len` values of a buffer.
fn convert<'a, X: Float>(x: &[X], floats: &'a mut [f32], len: usize) -> Result<&'a [f32], Error> {
    let floats = take("scratch for inputs", floats, len)?;
    floats.iter_mut().zip(x).for_each(|(float, x)| *float = x.to_f32());
    Ok(floats)
}

/// A batch of vectors in [`InputsBuf`], ready for every layer with the same arithmetic, group ([`BlockSize::group`]) and
/// kernels. A layer with [`Arithmetic::F32`] takes any.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    floats: &'a [f32],
    batch: usize,
    d_in: usize,
    quantized: Quantized<'a>,
}

/// What the arithmetics other than f32 multiply with.
#[derive(Debug, Clone, Copy)]
enum Quantized<'a> {
    No,
    SixteenByFour(Activations<'a>),
}

impl<'a> Inputs<'a> {
    /// Number of vectors.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of inputs of a vector.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// All inputs in f32, `[batch, d_in]`.
    pub(crate) fn all(&self) -> &'a [f32] {
        self.floats
    }

    /// The inputs of one vector in f32.
    pub(crate) fn vector(&self, index: usize) -> &'a [f32] {
        &self.floats[index * self.d_in..][..self.d_in]
    }

    /// The activations of the 16x4 product.
    pub(crate) fn activations(&self) -> Result<&Activations<'a>, Error> {
        match &self.quantized {
            Quantized::SixteenByFour(activations) => Ok(activations),
            Quantized::No => {
                let [expected, got] = [Arithmetic::SixteenByFour, Arithmetic::F32].map(Arithmetic::name);
                Err(Error::Arithmetic { expected, got })
            }
        }
    }
}

/// The lengths of the buffers.
struct Need {
    floats: usize,
    values: usize,
    scales: usize,
}

impl Need {
    const fn new(d_in: usize, block_size: BlockSize, batch: usize) -> Self {
        Self {
            floats: d_in.saturating_mul(batch),
            values: Activations::values_len(d_in, block_size).saturating_mul(batch),
            scales: Activations::scales_len(d_in, block_size).saturating_mul(batch),
        }
    }
}
