//! `LoRA` on an NF4 base weight.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use nf4_kernels::{BlockSize, Kernels};

use crate::adapter::{DEFAULT_SEED, LoRAAdapter, LoRAScaling};
use crate::error::{Error, check_len, or_panic};
use crate::lora::LoRALayer;
use crate::quantized::Quantized4Bit;
use crate::scratch::Scratch;
use crate::tensor::Tensor;

/// A linear layer with a frozen NF4 base weight `W` `[d_out, d_in]` and a `LoRA` adapter: `y = W x + scale * B (A x)`.
///
/// The base product is 16x4 on the packed bytes (see [`nf4_kernels::spec`]; about as precise as f16 activations), or f32
/// where blocks straddle rows; the adapter is f32. No weight is ever dequantized for it, and the bits of the result are the
/// same on each machine and with each choice of [`Kernels`].
///
/// Constructors quantize with block size 64, the default of `bitsandbytes`. For another one, for an existing base or for a
/// given adapter there is [`Self::try_from_parts`]:
///
/// ```
/// use nf4::{BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit};
/// let (d_out, d_in, rank) = (16, 256, 4);
/// let weight = vec![0.5_f32; d_out * d_in];
/// let base = Quantized4Bit::quantize(&weight, d_out, d_in, BlockSize::B128, true)?;
/// let adapter = LoRAAdapter::try_init(d_out, d_in, rank, 8.0, LoRAScaling::RsLoRA, 42)?;
/// let layer = QLoRALayer::try_from_parts(base, adapter)?;
/// assert_eq!(layer.scale(), 4.0);
///
/// // Forward without allocation:
/// let (mut scratch, mut y) = (layer.scratch(), [0.0; 16]);
/// layer.forward_into(&[1.0; 256], &mut scratch, &mut y)?;
/// # assert!((y[0] - 128.0).abs() < 1.0, "{y:?}");
/// # Ok::<(), nf4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QLoRALayer {
    base: Quantized4Bit,
    adapter: LoRAAdapter,
    kernels: Kernels,
}

/// Construction.
impl QLoRALayer {
    /// A layer with a fresh adapter of scale `alpha / rank`: `A` as by [`LoRAAdapter::try_init`] with [`DEFAULT_SEED`], `B`
    /// zero. `base_weight` is row-major `[d_out, d_in]`; its scales are not double-quantized.
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
    /// Those of [`Quantized4Bit::quantize`] and [`LoRAAdapter::try_init`].
    pub fn try_new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Result<Self, Error> {
        let base = Quantized4Bit::quantize(base_weight.data(), d_out, d_in, BlockSize::default(), false)?;
        let adapter = LoRAAdapter::try_init(d_out, d_in, rank, alpha, LoRAScaling::Standard, DEFAULT_SEED)?;
        Self::try_from_parts(base, adapter)
    }

    /// Quantizes the base of a `LoRA` layer and keeps its adapter. If the layer is merged, the weight before the merge is
    /// what is quantized, so the adapter counts once.
    ///
    /// # Panics
    /// Where [`Self::try_from_lora`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn from_lora(lora_layer: LoRALayer) -> Self {
        or_panic(Self::try_from_lora(lora_layer))
    }

    /// As [`Self::from_lora`].
    ///
    /// # Errors
    /// Those of [`Quantized4Bit::quantize`].
    pub fn try_from_lora(lora_layer: LoRALayer) -> Result<Self, Error> {
        Self::quantize_lora(lora_layer, false)
    }

    /// As [`Self::from_lora`], with double-quantized scales: 4.127 bits a weight instead of 4.5.
    ///
    /// # Panics
    /// Where [`Self::try_from_lora_double_quant`] gives an error.
    #[must_use]
    #[track_caller]
    pub fn from_lora_double_quant(lora_layer: LoRALayer) -> Self {
        or_panic(Self::try_from_lora_double_quant(lora_layer))
    }

    /// As [`Self::from_lora_double_quant`].
    ///
    /// # Errors
    /// Those of [`Quantized4Bit::quantize`].
    pub fn try_from_lora_double_quant(lora_layer: LoRALayer) -> Result<Self, Error> {
        Self::quantize_lora(lora_layer, true)
    }

    fn quantize_lora(lora_layer: LoRALayer, double_quant: bool) -> Result<Self, Error> {
        let (weight, adapter) = lora_layer.into_parts();
        let (d_out, d_in) = (adapter.d_out(), adapter.d_in());
        let base = Quantized4Bit::quantize(weight.data(), d_out, d_in, BlockSize::default(), double_quant)?;
        Self::try_from_parts(base, adapter)
    }

    /// A layer from a quantized base, of any block size, and an adapter for its shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if base and adapter differ in `[d_out, d_in]`.
    pub fn try_from_parts(base: Quantized4Bit, adapter: LoRAAdapter) -> Result<Self, Error> {
        let shapes = ([base.rows(), base.cols()], [adapter.d_out(), adapter.d_in()]);
        if shapes.0 != shapes.1 {
            return Err(Error::Mismatch { base: shapes.0, adapter: shapes.1 });
        }
        Ok(Self { base, adapter, kernels: Kernels::detect() })
    }

    /// The same layer on other kernels than those of [`Kernels::detect`]. That changes the speed, never a bit.
    #[must_use]
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// The base and the adapter.
    #[must_use]
    pub fn into_parts(self) -> (Quantized4Bit, LoRAAdapter) {
        (self.base, self.adapter)
    }
}

/// Products.
impl QLoRALayer {
    /// `y = W x + scale * B (A x)`. `x` has `d_in` values, `y` has `d_out`.
    ///
    /// If a value of `x` is NaN or infinite, every output is [`f32::NAN`] (where blocks straddle rows: what IEEE 754 says).
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
        let mut y = Tensor::zeros(self.d_out(), false);
        self.forward_into(x.data(), &mut self.scratch(), y.data_mut())?;
        Ok(y)
    }

    /// As [`Self::forward`], in buffers of the caller and without allocation. `scratch` comes from [`Self::scratch`] or was
    /// grown for this layer; see [`Scratch`] for its size.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have `d_in` values, `y` not `d_out`, or `scratch` is too small. `y` may then have
    /// been written to.
    pub fn forward_into(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) -> Result<(), Error> {
        check_len("input", self.d_in(), x.len())?;
        check_len("output", self.d_out(), y.len())?;
        let block_size = self.base.block_size();
        let (values, scales) = scratch.activations(x.len(), block_size)?;
        let activations = self.kernels.quantize_activations(x, block_size, values, scales)?;
        self.kernels.gemv(&self.base.view(), &activations, y)?;
        self.adapter.add_product(self.kernels, x, scratch.low_rank(self.rank())?, y)
    }

    /// Working memory for [`Self::forward_into`].
    #[must_use]
    pub fn scratch(&self) -> Scratch {
        let mut scratch = Scratch::new();
        scratch.reserve(self.d_in(), self.base.block_size(), self.rank());
        scratch
    }

    /// The merged weight `dequantize(base) + scale * B A`, row-major `[d_out, d_in]`.
    ///
    /// The base is exact, products and sums are f64 in the order of the rank, and each weight is rounded once to f32; the same
    /// bits everywhere. The result is the only copy made.
    ///
    /// # Panics
    /// If the result does not fit in memory; [`Self::merge_rows_into`] merges in parts.
    #[must_use]
    pub fn merge_to_f32(&self) -> Vec<f32> {
        let mut merged = vec![0.0; self.base.len()];
        self.merge_rows_into(0..self.d_out(), &mut merged).expect("all rows, and `merged` was made for them");
        merged
    }

    /// Some rows of [`Self::merge_to_f32`], `[rows.len(), d_in]`, in a buffer of the caller: for merging in small memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are no such rows or `out` does not have `rows.len() * d_in` values.
    pub fn merge_rows_into(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let first_row = rows.start;
        self.kernels.dequantize(&self.base.view().row_range(rows)?, out)?;
        self.adapter.add_to_rows(first_row, out);
        Ok(())
    }
}

/// What it is.
impl QLoRALayer {
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

    /// The quantized base weight, `[d_out, d_in]`.
    #[must_use]
    pub fn base_weight_quantized(&self) -> &Quantized4Bit {
        &self.base
    }

    /// The kernels in use.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.kernels
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
        self.base.rows()
    }

    /// Inputs.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.base.cols()
    }

    /// Always false: an adapter is never merged into packed weights, see [`Self::merge_to_f32`].
    #[must_use]
    pub fn is_merged(&self) -> bool {
        false
    }

    /// Whether the scales of the base are double-quantized.
    #[must_use]
    pub fn is_double_quantized(&self) -> bool {
        self.base.is_double_quantized()
    }

    /// What the layer holds in memory.
    #[must_use]
    pub fn memory_stats(&self) -> MemoryStats {
        let base_unquantized_bytes = self.base.len().saturating_mul(size_of::<f32>());
        let base_quantized_bytes = self.base.memory_bytes();
        let lora_bytes = self.adapter.memory_bytes();
        MemoryStats {
            base_unquantized_bytes,
            base_quantized_bytes,
            lora_bytes,
            total_bytes: base_quantized_bytes + lora_bytes,
            compression_ratio: base_unquantized_bytes as f32 / base_quantized_bytes as f32,
        }
    }
}

/// Bytes on the heap of a [`QLoRALayer`]; all that it holds, exactly. The layer's own struct is not counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryStats {
    /// What the base weight would take in f32: `d_out * d_in * 4`. It is not held.
    pub base_unquantized_bytes: usize,
    /// Packed codes and scales of the base: [`Quantized4Bit::memory_bytes`].
    pub base_quantized_bytes: usize,
    /// `A` and `B`, `(d_in + d_out) * rank * 4`; twice that once training has given both a gradient.
    pub lora_bytes: usize,
    /// Base and adapter: `base_quantized_bytes + lora_bytes`.
    pub total_bytes: usize,
    /// `base_unquantized_bytes / base_quantized_bytes`; NaN if there are no weights.
    pub compression_ratio: f32,
}
