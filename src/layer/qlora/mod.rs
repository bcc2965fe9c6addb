//! `LoRA` on an NF4 base weight.

mod forward;
mod merge;
mod requantize;
mod train;

use alloc::vec::Vec;

use nf4_kernels::{BlockSize, Kernels};

use crate::adapter::joined::Joined;
use crate::adapter::lora::{DEFAULT_SEED, LoRAAdapter, LoRAScaling};
use crate::error::{Error, or_panic};
use crate::layer::linear::Linear;
use crate::layer::lora::LoRALayer;
use crate::layer::memory::MemoryStats;
use crate::layer::methods::{adapter_accessors, packed_base};
use crate::tensor::Tensor;
use crate::weight::inputs::Arithmetic;
use crate::weight::quantized::Quantized4Bit;

pub use requantize::RequantizationStats;

/// A linear layer with a frozen NF4 base weight and a `LoRA` adapter: `y = W x + scale * B (A x) + bias`.
///
/// `W` is `[d_out, d_in]`, and the bias is frozen too ([`Self::with_bias`]; a layer starts without one). The base product
/// is computed directly on the packed bytes, in an [`Arithmetic`] that is by default about as precise as f16 activations.
/// Adapter and bias are f32. No weight is dequantized in memory, and the result has the same bits on every machine, with
/// all [`Kernels`] and in every batch.
///
/// The constructors quantize with block size 64, the default of `bitsandbytes`. [`Self::from_parts`] takes another block
/// size, an existing base or a given adapter:
///
/// ```
/// use nf4::{BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit};
/// let (d_out, d_in, rank) = (16, 256, 4);
/// let weight = vec![0.5_f32; d_out * d_in];
/// let base = Quantized4Bit::quantize(&weight, d_out, d_in, BlockSize::B128, true)?;
/// let adapter = LoRAAdapter::new(d_out, d_in, rank, 8.0, LoRAScaling::RsLoRA, 42)?;
/// let layer = QLoRALayer::from_parts(base, adapter)?;
/// assert_eq!(layer.scale(), 4.0);
///
/// // Forward without allocation:
/// let (mut scratch, mut y) = (layer.scratch(1), [0.0; 16]);
/// layer.forward_into(&[1.0; 256], &mut scratch, &mut y)?;
/// # assert!((y[0] - 128.0).abs() < 1.0, "{y:?}");
/// # Ok::<(), nf4::Error>(())
/// ```
#[doc(alias = "Linear4bit")]
#[derive(Debug, Clone)]
pub struct QLoRALayer {
    linear: Linear,
    adapter: Joined,
}

/// Construction.
impl QLoRALayer {
    /// Quantizes a base weight, row-major `[d_out, d_in]`, and adds a fresh adapter with scale `alpha / rank`: random `A`
    /// (see [`LoRAAdapter::new`]; the seed is [`DEFAULT_SEED`]) and `B` zero. The scales are not double-quantized.
    ///
    /// # Panics
    /// Where [`Self::try_new`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Self {
        or_panic(Self::try_new(base_weight, d_out, d_in, rank, alpha))
    }

    /// Like [`Self::new`], but returns errors.
    ///
    /// # Errors
    /// [`Error::MatrixLength`] if there are not `d_out * d_in` weights; [`Error::NotFinite`] if one of them is NaN or
    /// infinite; [`Error::RankZero`] if `rank` is 0; [`Error::Alpha`] if alpha or the scale is NaN or infinite;
    /// [`Error::Shape`] if the number of elements of a matrix does not fit in `usize`; [`Error::OutOfMemory`].
    pub fn try_new(base_weight: Tensor, d_out: usize, d_in: usize, rank: usize, alpha: f32) -> Result<Self, Error> {
        let base = Quantized4Bit::quantize(base_weight.data(), d_out, d_in, BlockSize::default(), false)?;
        let adapter = LoRAAdapter::new(d_out, d_in, rank, alpha.into(), LoRAScaling::Standard, DEFAULT_SEED)?;
        Self::from_parts(base, adapter)
    }

    /// Quantizes the base weight of a `LoRA` layer and keeps its adapter and bias. If the layer is merged, the weight
    /// before the merge is quantized, so that the adapter does not count twice.
    ///
    /// # Panics
    /// Where [`Self::try_from_lora`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn from_lora(lora_layer: LoRALayer) -> Self {
        or_panic(Self::try_from_lora(lora_layer))
    }

    /// Like [`Self::from_lora`], but returns errors.
    ///
    /// # Errors
    /// The [errors of all layers](crate#errors).
    pub fn try_from_lora(lora_layer: LoRALayer) -> Result<Self, Error> {
        Self::quantize_lora(lora_layer, false)
    }

    /// Like [`Self::from_lora`], with double-quantized scales: 4.127 bits per weight instead of 4.5.
    ///
    /// # Panics
    /// Where [`Self::try_from_lora_double_quant`] returns an error.
    #[must_use]
    #[track_caller]
    pub fn from_lora_double_quant(lora_layer: LoRALayer) -> Self {
        or_panic(Self::try_from_lora_double_quant(lora_layer))
    }

    /// Like [`Self::from_lora_double_quant`], but returns errors.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if weights are so large (above `1e30`, say) that their double-quantized scales are not
    /// finite; and [those of all layers](crate#errors).
    pub fn try_from_lora_double_quant(lora_layer: LoRALayer) -> Result<Self, Error> {
        Self::quantize_lora(lora_layer, true)
    }

    fn quantize_lora(lora_layer: LoRALayer, double_quant: bool) -> Result<Self, Error> {
        let (weight, bias, adapter) = lora_layer.into_parts();
        let (d_out, d_in) = (adapter.d_out(), adapter.d_in());
        let base = Quantized4Bit::quantize(weight.data(), d_out, d_in, BlockSize::default(), double_quant)?;
        let layer = Self::from_parts(base, adapter)?;
        match bias {
            Some(bias) => layer.with_bias(bias),
            None => Ok(layer),
        }
    }

    /// Joins a quantized base weight, of any block size, and an adapter of its shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if base and adapter differ in `[d_out, d_in]`; and [those of all layers](crate#errors).
    pub fn from_parts(base: Quantized4Bit, adapter: LoRAAdapter) -> Result<Self, Error> {
        let linear = Linear::new(base);
        let adapter = Joined::new(adapter, &linear.base()?)?;
        Ok(Self { linear, adapter })
    }

    /// The base, the bias and the adapter.
    #[must_use]
    pub fn into_parts(self) -> (Quantized4Bit, Option<Vec<f32>>, LoRAAdapter) {
        (self.linear.weight, self.linear.bias.map(<[f32]>::into_vec), self.adapter.into_adapter())
    }
}

packed_base!(QLoRALayer);
adapter_accessors!(QLoRALayer);

/// Accessors.
impl QLoRALayer {
    /// Always false, because an adapter is never merged into packed weights; see [`Self::merge_to_f32`].
    #[must_use]
    pub fn is_merged(&self) -> bool {
        false
    }

    /// Whether the scales of the base are double-quantized.
    #[must_use]
    pub fn is_double_quantized(&self) -> bool {
        self.linear.weight.is_double_quantized()
    }

    /// The memory that the layer takes.
    #[must_use]
    pub fn memory_stats(&self) -> MemoryStats {
        MemoryStats::new(&self.linear, self.adapter.memory_bytes())
    }
}
