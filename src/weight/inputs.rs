//! Inputs of products, which are prepared once for any number of weights.

use alloc::vec::Vec;

use bytemuck::cast_slice_mut;
use nf4_kernels::{Activations, Activations8x8, BlockSize, Float, Kernels};

use crate::buffer::{grow, take};
use crate::error::Error;

/// The arithmetic in which a layer multiplies by its packed weight: how precise and how fast it is.
///
/// Keep the default unless speed matters more than the last digits of the outputs, as in text generation on a phone: then
/// take [`EightByEight`](Self::EightByEight). It gains most on CPUs with dot products of 8-bit integers (`dotprod`, `i8mm`,
/// VNNI), and from batches more than from one vector. Weights whose blocks straddle rows are much faster with it, too.
///
/// Adapters and bias are always f32. In training, the gradient of the input is the transposed 16x4 product, or with
/// [`F32`](Self::F32) that in f32.
#[doc(alias = "bnb_4bit_compute_dtype")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// The 16x4 product: a 16-bit codebook times 14-bit activations with one f32 scale per 64. It is about as precise as
    /// f16 activations, and faster than f32. Weights whose blocks straddle rows are multiplied in f32 nevertheless. See
    /// [`spec`](nf4_kernels::spec).
    #[default]
    SixteenByFour,
    /// The 8x8 product: an 8-bit codebook times 8-bit activations with one f32 scale per 32. It is about as precise as the
    /// 8-bit activations of other libraries, and faster than 16x4, especially on CPUs with dot products of 8-bit integers.
    /// If the number of inputs is not a multiple of 32, the product is computed in f32. See [`spec`](nf4_kernels::spec).
    EightByEight,
    /// The f32 product: f32 codebook and f32 activations. See [`spec`](nf4_kernels::spec).
    F32,
}

impl Arithmetic {
    /// Every arithmetic, the default first.
    pub const ALL: [Self; 3] = [Self::SixteenByFour, Self::EightByEight, Self::F32];

    /// The name in the specification: `16x4`, `8x8` or `f32`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SixteenByFour => "16x4",
            Self::EightByEight => "8x8",
            Self::F32 => "f32",
        }
    }
}

/// Buffers for inputs that are quantized once and used by several layers, such as the projections of an attention block.
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
    /// Activations of the 16x4 product, or of the 8x8 product, two in each.
    values: Vec<i16>,
    scales: Vec<f32>,
}

impl InputsBuf {
    /// Empty buffers, to be grown by [`Self::reserve`].
    #[must_use]
    pub const fn new() -> Self {
        Self { floats: Vec::new(), values: Vec::new(), scales: Vec::new() }
    }

    /// Grows the buffers, if necessary, for batches of `batch` vectors of `d_in` inputs and weights of this block size.
    ///
    /// They serve inputs of every type and every [`Arithmetic`]. A vector takes 4 bytes per input for the f32 values of f16
    /// and bf16 inputs. If `d_in` is a multiple of 32, it
    /// also takes 4 bytes per 32 inputs, and 2 bytes per input (1 if `d_in` is not a multiple of 64 and the block size not
    /// 32), with `d_in` rounded up to a multiple of 64.
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

    /// The bytes that [`Self::reserve`] takes with these arguments; `usize::MAX` if there are more.
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

    /// Quantizes inputs `[batch, d_in]` for an arithmetic, and converts them to f32 too if `floats` is set.
    pub(crate) fn prepare<'a, X: Float>(
        &'a mut self,
        x: &'a [X],
        [batch, d_in]: [usize; 2],
        block_size: BlockSize,
        arithmetic: Arithmetic,
        kernels: Kernels,
        floats: bool,
    ) -> Result<Inputs<'a, X>, Error> {
        // The f32 product converts its inputs for every tile of rows.
        let floats = floats || arithmetic == Arithmetic::F32;
        let floats = if floats { convert(x, &mut self.floats)? } else { &[] };
        let quantized = match arithmetic {
            Arithmetic::F32 => Quantized::No,
            Arithmetic::SixteenByFour => {
                let lens = [Activations::values_len(d_in, block_size), Activations::scales_len(d_in, block_size)];
                let (values, scales) = take_both(&mut self.values, &mut self.scales, lens, batch)?;
                let activations = kernels.quantize_activations_batch(x, d_in, block_size, values, scales)?;
                Quantized::SixteenByFour(activations)
            }
            Arithmetic::EightByEight => {
                // Whole spans, which are an even number.
                let lens = [Activations8x8::values_len(d_in) / 2, Activations8x8::scales_len(d_in)];
                let (values, scales) = take_both(&mut self.values, &mut self.scales, lens, batch)?;
                let values = cast_slice_mut(values);
                Quantized::EightByEight(kernels.quantize_activations_8x8_batch(x, d_in, values, scales)?)
            }
        };
        Ok(Inputs { floats, batch, d_in, quantized })
    }

    /// Converts inputs `[batch, d_in]` to f32 for products with dense weights.
    pub(crate) fn convert<'a, X: Float>(
        &'a mut self,
        x: &'a [X],
        [batch, d_in]: [usize; 2],
    ) -> Result<Inputs<'a, X>, Error> {
        let floats = convert(x, &mut self.floats)?;
        Ok(Inputs { floats, batch, d_in, quantized: Quantized::No })
    }
}

/// The first of the values and scales in the buffers: `lens` of them for each vector.
fn take_both<'a>(
    values: &'a mut [i16],
    scales: &'a mut [f32],
    lens: [usize; 2],
    batch: usize,
) -> Result<(&'a mut [i16], &'a mut [f32]), Error> {
    let [values_len, scales_len] = lens.map(|len| len.saturating_mul(batch));
    Ok((
        take("scratch for activation values", values, values_len)?,
        take("scratch for activation scales", scales, scales_len)?,
    ))
}

/// Inputs as f32, exactly: themselves, or the first values of a buffer.
fn convert<'a, X: Float>(x: &'a [X], floats: &'a mut [f32]) -> Result<&'a [f32], Error> {
    if let Some(x) = X::as_f32(x) {
        return Ok(x);
    }
    let floats = take("scratch for inputs", floats, x.len())?;
    floats.iter_mut().zip(x).for_each(|(float, x)| *float = x.to_f32());
    Ok(floats)
}

/// A batch of vectors of type `X`, quantized in an [`InputsBuf`], ready for every layer with the same arithmetic, group
/// ([`BlockSize::activation_group`]) and kernels. Layers with [`Arithmetic::F32`] take any.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, X = f32> {
    /// Empty if neither an adapter nor the product reads them.
    floats: &'a [f32],
    batch: usize,
    d_in: usize,
    quantized: Quantized<'a, X>,
}

/// Quantized inputs, for arithmetics other than f32.
#[derive(Debug, Clone, Copy)]
enum Quantized<'a, X> {
    No,
    SixteenByFour(Activations<'a, X>),
    EightByEight(Activations8x8<'a, X>),
}

impl<X> Quantized<'_, X> {
    /// The error that a layer with another arithmetic returns.
    fn not_for(&self, arithmetic: Arithmetic) -> Error {
        let got = match self {
            Self::No => Arithmetic::F32,
            Self::SixteenByFour(_) => Arithmetic::SixteenByFour,
            Self::EightByEight(_) => Arithmetic::EightByEight,
        };
        Error::Arithmetic { expected: arithmetic.name(), got: got.name() }
    }
}

impl<'a, X: Float> Inputs<'a, X> {
    /// Number of vectors.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of inputs per vector.
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
    pub(crate) fn activations(&self) -> Result<&Activations<'a, X>, Error> {
        match &self.quantized {
            Quantized::SixteenByFour(activations) => Ok(activations),
            other => Err(other.not_for(Arithmetic::SixteenByFour)),
        }
    }

    /// The activations of the 8x8 product.
    pub(crate) fn activations_8x8(&self) -> Result<&Activations8x8<'a, X>, Error> {
        match &self.quantized {
            Quantized::EightByEight(activations) => Ok(activations),
            other => Err(other.not_for(Arithmetic::EightByEight)),
        }
    }
}

/// The lengths of the buffers, for whichever arithmetic needs most.
struct Need {
    floats: usize,
    values: usize,
    scales: usize,
}

impl Need {
    const fn new(d_in: usize, block_size: BlockSize, batch: usize) -> Self {
        Self {
            floats: d_in.saturating_mul(batch),
            values: larger(Activations::values_len(d_in, block_size), Activations8x8::values_len(d_in) / 2)
                .saturating_mul(batch),
            scales: larger(Activations::scales_len(d_in, block_size), Activations8x8::scales_len(d_in))
                .saturating_mul(batch),
        }
    }
}

const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}
