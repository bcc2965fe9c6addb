//! Many adapters on one base.

use alloc::boxed::Box;
use alloc::vec::Vec;

use nf4_kernels::Kernels;

use crate::adapter::lora::LoRAAdapter;
use crate::error::Error;
use crate::layer::linear::{Arithmetic, Linear, Term};
use crate::layer::memory::MemoryStats;
use crate::weight::quantized::Quantized4Bit;

/// A linear layer with a frozen NF4 base weight `W` `[d_out, d_in]` and any number of named adapters, each with a
/// weight: `y = W x + sum of weight * scale * B (A x) + bias` over the active ones, or over the one that was chosen for
/// a vector.
///
/// The base is held once, and no adapter is ever merged into it: adapters are added, switched, weighted and removed at
/// the cost of the adapter alone. All forwards take `&self`, so threads share one layer, each with a [`crate::Scratch`]
/// of its own. Without an active adapter it is the quantized linear layer alone.
///
/// The arithmetic is that of [`crate::QLoRALayer`]; with one adapter of weight 1 the bits are the same too. Adapters
/// are added up in the order of their names, so it does not matter in which order they came.
///
/// ```
/// use nf4::{BlockSize, LoRAAdapter, LoRAScaling, MultiAdapterLayer, Quantized4Bit, Tensor};
/// let (d_out, d_in) = (16, 128);
/// let base = Quantized4Bit::quantize(&vec![0.5_f32; d_out * d_in], d_out, d_in, BlockSize::B64, true)?;
/// let mut layer = MultiAdapterLayer::new(base);
/// for (name, b) in [("french", 0.25), ("german", 0.5)] {
///     let (a, b) = (vec![1.0; d_in], vec![b; d_out]);
///     layer.add(name, LoRAAdapter::try_from_parts(a, b, [d_out, d_in], 1, 1.0, LoRAScaling::Standard)?)?;
/// }
///
/// // The same adapters for every vector:
/// layer.set_active(&["french", "german"])?;
/// layer.set_weight("german", 0.5)?;
/// let x = Tensor::from_vec(vec![1.0; 3 * d_in], false);
/// let both = layer.forward_batch(&x);
/// # assert!((both.data()[0] - 64.0 * 2.0).abs() < 0.1, "{:?}", both.data());
///
/// // Or one for each vector:
/// let each = layer.try_forward_batch_with(&x, &[Some("german"), None, Some("french")])?;
/// # assert!((each.data()[16] - 64.0).abs() < 0.1, "{:?}", each.data());
/// # Ok::<(), nf4::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MultiAdapterLayer {
    pub(crate) linear: Linear,
    /// Sorted by name.
    adapters: Vec<Named>,
}

#[derive(Debug, Clone)]
struct Named {
    name: Box<str>,
    adapter: LoRAAdapter,
    weight: f32,
    active: bool,
}

impl Named {
    fn term(&self) -> Term<'_> {
        Term { adapter: &self.adapter, weight: self.weight }
    }
}

/// Construction.
impl MultiAdapterLayer {
    /// A layer without adapters and bias.
    #[must_use]
    pub fn new(base: Quantized4Bit) -> Self {
        Self { linear: Linear::new(base), adapters: Vec::new() }
    }

    /// The same layer with a bias, `[d_out]`, instead of the one that it had, if any.
    ///
    /// # Errors
    /// [`Error::Shape`] if `bias` does not have `d_out` values; [`Error::NotFinite`] if one is NaN or infinite.
    pub fn try_with_bias(self, bias: Vec<f32>) -> Result<Self, Error> {
        Ok(Self { linear: self.linear.with_bias(bias)?, ..self })
    }

    /// The same layer with another arithmetic of the base product than [`Arithmetic::SixteenByFour`].
    #[must_use]
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.linear.arithmetic = arithmetic;
        self
    }

    /// The same layer on other kernels than those of [`Kernels::detect`]. That changes the speed, never a bit.
    #[must_use]
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.linear.kernels = kernels;
        self
    }
}

/// The adapters.
impl MultiAdapterLayer {
    /// Adds an adapter, with weight 1 and not active.
    ///
    /// # Errors
    /// [`Error::DuplicateAdapter`] if there is one of this name; [`Error::Adapter`] around [`Error::Mismatch`] if it
    /// was made for another `[d_out, d_in]`, or around [`Error::MatrixLength`] if its tensors were replaced by others.
    pub fn add(&mut self, name: &str, mut adapter: LoRAAdapter) -> Result<(), Error> {
        let Err(place) = self.search(name) else { return Err(Error::DuplicateAdapter { name: name.into() }) };
        let joined = self.linear.check_adapter(&adapter).and_then(|()| adapter.join(self.linear.base()));
        joined.map_err(|error| in_adapter(name, error))?;
        self.adapters.insert(place, Named { name: name.into(), adapter, weight: 1.0, active: false });
        Ok(())
    }

    /// Takes an adapter out.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if there is none of this name.
    pub fn remove(&mut self, name: &str) -> Result<LoRAAdapter, Error> {
        let place = self.search(name).map_err(|_| unknown(name))?;
        Ok(self.adapters.remove(place).adapter)
    }

    /// Gives an adapter another name. It keeps its weight and stays active if it was.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if there is none of this name; [`Error::DuplicateAdapter`] if there is another of the
    /// new name.
    pub fn rename(&mut self, name: &str, new_name: &str) -> Result<(), Error> {
        let place = self.search(name).map_err(|_| unknown(name))?;
        if name != new_name && self.search(new_name).is_ok() {
            return Err(Error::DuplicateAdapter { name: new_name.into() });
        }
        let named = Named { name: new_name.into(), ..self.adapters.remove(place) };
        let (Ok(place) | Err(place)) = self.search(new_name);
        self.adapters.insert(place, named);
        Ok(())
    }

    /// Makes exactly these adapters active; none if there are no names.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] with the first name that there is no adapter of; nothing has changed then.
    pub fn set_active(&mut self, names: &[&str]) -> Result<(), Error> {
        self.check_names(names.iter().copied())?;
        self.adapters.iter_mut().for_each(|a| a.active = names.contains(&&*a.name));
        Ok(())
    }

    /// Sets the weight of an adapter: what its scale is multiplied by, in f32, in every forward. It may be zero or
    /// negative.
    ///
    /// # Errors
    /// [`Error::UnknownAdapter`] if there is none of this name; [`Error::Adapter`] around [`Error::NotFinite`] if the
    /// weight or its product with the scale is NaN or infinite.
    pub fn set_weight(&mut self, name: &str, weight: f32) -> Result<(), Error> {
        let place = self.search(name).map_err(|_| unknown(name))?;
        let adapter = &mut self.adapters[place];
        for (what, value) in [("weight", weight), ("weight times scale", weight * adapter.adapter.scale())] {
            if !value.is_finite() {
                return Err(in_adapter(name, Error::NotFinite { what, index: 0, value }));
            }
        }
        adapter.weight = weight;
        Ok(())
    }

    /// The names of all adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|a| &*a.name)
    }

    /// The names of the active adapters, sorted.
    pub fn active(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().filter(|a| a.active).map(|a| &*a.name)
    }

    /// An adapter.
    #[must_use]
    pub fn adapter(&self, name: &str) -> Option<&LoRAAdapter> {
        Some(&self.find(name)?.adapter)
    }

    /// The weight of an adapter.
    #[must_use]
    pub fn weight(&self, name: &str) -> Option<f32> {
        Some(self.find(name)?.weight)
    }

    fn search(&self, name: &str) -> Result<usize, usize> {
        self.adapters.binary_search_by(|a| (*a.name).cmp(name))
    }

    fn find(&self, name: &str) -> Option<&Named> {
        self.search(name).ok().map(|place| &self.adapters[place])
    }

    /// The active adapters, for a forward.
    pub(crate) fn active_terms(&self) -> impl Iterator<Item = Term<'_>> {
        self.adapters.iter().filter(|a| a.active).map(Named::term)
    }

    /// The adapter of a vector, if it has one, for a forward.
    pub(crate) fn chosen_term(&self, name: Option<&str>) -> impl Iterator<Item = Term<'_>> {
        name.and_then(|name| self.find(name)).map(Named::term).into_iter()
    }

    pub(crate) fn sum_of_ranks(&self) -> usize {
        self.adapters.iter().fold(0, |sum, a| sum.saturating_add(a.adapter.rank()))
    }

    /// `Ok` if there is an adapter of each of the names.
    pub(crate) fn check_names<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
        names.find(|name| self.find(name).is_none()).map_or(Ok(()), |name| Err(unknown(name)))
    }
}

/// What it is.
impl MultiAdapterLayer {
    /// The quantized base weight, `[d_out, d_in]`.
    #[must_use]
    pub fn base_weight_quantized(&self) -> &Quantized4Bit {
        &self.linear.weight
    }

    /// The bias, `[d_out]`, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.linear.bias.as_deref()
    }

    /// How the base product is computed.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        self.linear.arithmetic
    }

    /// The kernels in use.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.linear.kernels
    }

    /// Outputs.
    #[must_use]
    pub fn d_out(&self) -> usize {
        self.linear.d_out()
    }

    /// Inputs.
    #[must_use]
    pub fn d_in(&self) -> usize {
        self.linear.d_in()
    }

    /// What the layer holds in memory: the base once, and all adapters.
    #[must_use]
    pub fn memory_stats(&self) -> MemoryStats {
        MemoryStats::new(&self.linear, self.adapters.iter().map(|a| a.adapter.memory_bytes()).sum())
    }
}

fn unknown(name: &str) -> Error {
    Error::UnknownAdapter { name: name.into() }
}

fn in_adapter(name: &str, error: Error) -> Error {
    Error::Adapter { name: name.into(), error: Box::new(error) }
}
