//! The memory that a layer takes.

use crate::layer::linear::Linear;

/// The memory that a layer with packed weights takes, in bytes, from [`QLoRALayer::memory_stats`] and
/// [`MultiAdapterLayer::memory_stats`].
///
/// All numbers are exact; they leave out the struct of the layer itself and the names of adapters.
///
/// [`QLoRALayer::memory_stats`]: crate::QLoRALayer::memory_stats
/// [`MultiAdapterLayer::memory_stats`]: crate::MultiAdapterLayer::memory_stats
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryStats {
    /// What the base weight would take in f32, `d_out * d_in * 4`; it is not in memory.
    pub base_unquantized_bytes: usize,
    /// Packed codes and scales of the base, owned or not: [`Quantized4Bit::data_bytes`](crate::Quantized4Bit::data_bytes).
    pub base_quantized_bytes: usize,
    /// `A` and `B` of every adapter, `(d_in + d_out) * rank * 4`; with `DoRA` also its magnitude, norms and gains,
    /// `d_out * 12`; and gradients, once training has allocated them.
    pub lora_bytes: usize,
    /// Everything that the layer itself has on the heap: the base, unless its bytes are static or shared
    /// ([`Quantized4Bit::memory_bytes`]), the adapters, and the bias, `d_out * 4`, if there is one.
    ///
    /// [`Quantized4Bit::memory_bytes`]: crate::Quantized4Bit::memory_bytes
    pub total_bytes: usize,
    /// `base_unquantized_bytes / base_quantized_bytes`; NaN if there are no weights.
    pub compression_ratio: f32,
}

impl MemoryStats {
    pub(crate) fn new(linear: &Linear, lora_bytes: usize) -> Self {
        let base_unquantized_bytes = linear.weight.len().saturating_mul(size_of::<f32>());
        let base_quantized_bytes = linear.weight.data_bytes();
        let bias_bytes = linear.bias.as_deref().map_or(0, size_of_val);
        Self {
            base_unquantized_bytes,
            base_quantized_bytes,
            lora_bytes,
            total_bytes: linear.weight.memory_bytes() + lora_bytes + bias_bytes,
            compression_ratio: base_unquantized_bytes as f32 / base_quantized_bytes as f32,
        }
    }
}
