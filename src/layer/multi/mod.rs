//! Many adapters on one base.

mod forward;
mod set;
mod train;

use alloc::vec::Vec;

use nf4_kernels::Kernels;

use crate::adapter::lora::LoRAAdapter;
use crate::error::Error;
use crate::layer::linear::Linear;
use crate::layer::memory::MemoryStats;
use crate::layer::methods::packed_base;
use crate::weight::inputs::Arithmetic;
use crate::weight::quantized::Quantized4Bit;

pub use forward::Adapters;
pub use set::AdapterId;
use set::AdapterSet;

/// A linear layer with a frozen NF4 base weight and any number of named adapters, which can be combined, or chosen for each
/// vector of a batch.
///
/// It computes `y = W x + sum of weight * scale * B (A x) + bias`, where `W` is `[d_out, d_in]`, over the active adapters or
/// over the one that was chosen for a vector. Every adapter has an adapter weight; without adapters, this is a plain quantized
/// linear layer. The base is in memory once, and no adapter is ever merged into it, so adding, switching, weighting and
/// removing adapters is cheap. All forwards take `&self`, so threads can share one layer, each with its own
/// [`Scratch`](crate::Scratch).
///
/// The arithmetic is that of [`QLoRALayer`], and with one adapter of weight 1 the bits are the same too. Adapters are
/// summed in the order of their names, whatever the order in which they were added.
///
/// ```
/// use nf4::{Adapters, BlockSize, LoRAAdapter, LoRAScaling, MultiAdapterLayer, Quantized4Bit, Tensor};
/// let (d_out, d_in) = (16, 128);
/// let base = Quantized4Bit::quantize(&vec![0.5_f32; d_out * d_in], d_out, d_in, BlockSize::B64, true)?;
/// let mut layer = MultiAdapterLayer::new(base);
/// for (name, b) in [("french", 0.25), ("german", 0.5)] {
///     let (a, b) = (vec![1.0; d_in], vec![b; d_out]);
///     layer.add(name, LoRAAdapter::from_parts(a, b, d_out, d_in, 1, 1.0, LoRAScaling::Standard)?)?;
/// }
///
/// // The same adapters for every vector:
/// layer.set_active(&["french", "german"])?;
/// layer.set_adapter_weight("german", 0.5)?;
/// let x = Tensor::from_vec(vec![1.0; 3 * d_in], false);
/// let both = layer.forward(&x, Adapters::Active);
/// # assert!((both.data()[0] - 64.0 * 2.0).abs() < 0.1, "{:?}", both.data());
///
/// // Or one for each vector:
/// let ids = [layer.id("german"), None, layer.id("french")];
/// let each = layer.forward(&x, Adapters::PerVector(&ids));
/// # assert!((each.data()[16] - 64.0).abs() < 0.1, "{:?}", each.data());
/// # Ok::<(), nf4::Error>(())
/// ```
///
/// [`QLoRALayer`]: crate::QLoRALayer
#[doc(alias = "Linear4bit")]
#[derive(Debug, Clone)]
pub struct MultiAdapterLayer {
    linear: Linear,
    adapters: AdapterSet,
}

/// Construction.
impl MultiAdapterLayer {
    /// A layer without adapters and without bias.
    #[must_use]
    pub fn new(base: Quantized4Bit) -> Self {
        Self { linear: Linear::new(base), adapters: AdapterSet::default() }
    }
}

/// Adapters.
impl MultiAdapterLayer {
    /// Adds an adapter, which has adapter weight 1 and is not active, and returns its id.
    ///
    /// # Errors
    /// [`Error::DuplicateAdapter`] if the layer has an adapter of this name; [`Error::Adapter`], which contains
    /// [`Error::Mismatch`] if the adapter was made for another `[d_out, d_in]`, or [`Error::MatrixLength`] or
    /// [`Error::Shape`] if one of its tensors was replaced by one of another length; [`Error::OutOfMemory`].
    #[doc(alias("add_adapter", "load_adapter"))]
    pub fn add(&mut self, name: &str, adapter: LoRAAdapter) -> Result<AdapterId, Error> {
        self.adapters.add(name, adapter, &self.linear.base()?)
    }

    /// Removes an adapter and returns it.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if the layer has no adapter of this name.
    #[doc(alias = "delete_adapter")]
    pub fn remove(&mut self, name: &str) -> Result<LoRAAdapter, Error> {
        self.adapters.remove(name)
    }

    /// Renames an adapter. It keeps its id and its adapter weight, and stays active if it was.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if the layer has no adapter of this name; [`Error::DuplicateAdapter`] if it has another
    /// one of the new name.
    pub fn rename(&mut self, name: &str, new_name: &str) -> Result<(), Error> {
        self.adapters.rename(name, new_name)
    }

    /// Makes these adapters active, and all others inactive.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] with the first name that no adapter has; nothing has then changed.
    #[doc(alias = "set_adapter")]
    pub fn set_active(&mut self, names: &[&str]) -> Result<(), Error> {
        self.adapters.set_active(names)
    }

    /// Sets the adapter weight, by which every forward multiplies its scale, in f32. It may be zero or negative.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if the layer has no adapter of this name; [`Error::Adapter`], which contains
    /// [`Error::NotFinite`], if the adapter weight or its product with the scale is NaN or infinite.
    #[doc(alias = "add_weighted_adapter")]
    pub fn set_adapter_weight(&mut self, name: &str, weight: f32) -> Result<(), Error> {
        self.adapters.set_weight(name, weight)
    }

    /// The id of the adapter with this name, for [`Adapters::PerVector`].
    #[must_use]
    pub fn id(&self, name: &str) -> Option<AdapterId> {
        self.adapters.id(name)
    }

    /// The names of all adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|named| &*named.name)
    }

    /// The names of the active adapters, sorted.
    pub fn active(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().filter(|named| named.active).map(|named| &*named.name)
    }

    /// The adapter with this name.
    #[must_use]
    pub fn adapter(&self, name: &str) -> Option<&LoRAAdapter> {
        Some(self.adapters.find(name)?.adapter.adapter())
    }

    /// The adapter weight of the adapter with this name, 1 unless [`Self::set_adapter_weight`] changed it.
    #[must_use]
    pub fn adapter_weight(&self, name: &str) -> Option<f32> {
        Some(self.adapters.find(name)?.weight)
    }
}

packed_base!(MultiAdapterLayer);

/// Accessors.
impl MultiAdapterLayer {
    /// The memory that the layer takes: the base once, and all adapters.
    #[must_use]
    pub fn memory_stats(&self) -> MemoryStats {
        MemoryStats::new(&self.linear, self.adapters.iter().map(|named| named.adapter.memory_bytes()).sum())
    }
}
