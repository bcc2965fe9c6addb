//! An adapter: its configuration, the low-rank pair of each module, and what else was trained.

use alloc::borrow::{Cow, ToOwned};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::super::error::CheckpointError;
use super::super::linear4bit::Linear4bit;
use super::super::read::read_floats;
use super::super::source::TensorMap;
use super::PREFIX;
use super::config::PeftConfig;
use crate::{LoRAAdapter, QLoRALayer};

/// The kind of module that an adapter is for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PeftModuleKind {
    /// A matrix `[d_out, d_in]`, or the transposed one of a `Conv1D`.
    #[default]
    Linear,
    /// An embedding `[d_in, d_out]`: a row for each token.
    Embedding,
    /// A convolution `[d_out, in, ...]` with a kernel of this shape; `d_in` is the product of all dimensions but the
    /// first.
    Convolution(Vec<usize>),
}

/// The adapter of one module of a model: a [`LoRAAdapter`], the bias of its `B`, and the kind of module.
#[derive(Debug, Clone)]
pub struct PeftModule {
    pub(super) adapter: LoRAAdapter,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) kind: PeftModuleKind,
}

impl PeftModule {
    /// `A`, `B`, the scale, and the magnitude of `DoRA` if there is one.
    #[must_use]
    pub fn adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// The bias of `B`, `[out]`, if `lora_bias` is set. It is multiplied by the scale, like `B`.
    #[must_use]
    pub fn lora_bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// The kind of module that it is for.
    #[must_use]
    pub fn kind(&self) -> &PeftModuleKind {
        &self.kind
    }
}

/// The pair of a parameter that is not the weight of a layer, such as those of fused experts: `A` `[rank * n, in]` and
/// `B` `[out, rank * n]` for `n` experts. Which parameter it is for, and so its rank, the shapes of the base tell.
#[derive(Debug, Clone)]
pub(in super::super) struct Factors {
    pub(in super::super) a: Vec<f32>,
    pub(in super::super) a_shape: [usize; 2],
    pub(in super::super) b: Vec<f32>,
    pub(in super::super) b_shape: [usize; 2],
}

/// The rows of an embedding that were trained for some tokens, which PEFT calls `trainable_token_indices`.
#[doc(alias = "trainable_token_indices")]
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedTokens {
    pub(in super::super) indices: Vec<usize>,
    /// `[indices.len(), width]`.
    pub(in super::super) values: Vec<f32>,
    pub(in super::super) width: usize,
}

impl AdaptedTokens {
    /// The tokens whose rows were trained.
    #[must_use]
    pub fn indices(&self) -> &[usize] {
        &self.indices
    }

    /// Their rows, row-major, which replace those of the base.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// A PEFT adapter for a whole model, as `adapter_config.json` and `adapter_model.safetensors` hold it: a [`LoRAAdapter`] for
/// each adapted module, and whatever else was trained.
///
/// ```
/// use nf4::checkpoint::{FloatType, PeftAdapter, TensorFile};
/// use nf4::{LoRAAdapter, LoRAScaling};
///
/// // Adapters for two modules, and the two files that PEFT loads.
/// let lora = |seed| LoRAAdapter::new(32, 64, 8, 16.0, LoRAScaling::Standard, seed);
/// let modules = ["q_proj", "v_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
/// let adapter = PeftAdapter::new(modules.iter().cloned().zip([lora(0)?, lora(1)?]))?;
/// let (config, tensors) = adapter.to_files(FloatType::F32)?;
///
/// // And back.
/// let adapter = PeftAdapter::load(config.as_ref(), &TensorFile::parse(&tensors)?)?;
/// let q = adapter.module("model.layers.0.self_attn.q_proj").ok_or("not adapted")?;
/// assert_eq!((adapter.modules().count(), q.adapter().rank()), (2, 8));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`Self::layer`] joins the adapter of a module with a 4-bit base, and [`MergedModel`] merges all of it.
///
/// [`MergedModel`]: super::super::MergedModel
#[doc(alias = "PeftModel")]
#[derive(Debug, Clone)]
pub struct PeftAdapter {
    pub(super) config: PeftConfig,
    pub(super) modules: BTreeMap<String, PeftModule>,
    /// By module; the outermost first.
    pub(super) parameters: BTreeMap<String, Vec<Factors>>,
    pub(super) tokens: BTreeMap<String, AdaptedTokens>,
    pub(super) replaced: TensorMap<'static>,
    pub(super) bases: TensorMap<'static>,
    /// The replaced tensors that `modules_to_save` names, and where the name begins in theirs.
    pub(super) saved: BTreeMap<String, usize>,
}

/// Accessors.
impl PeftAdapter {
    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The modules with an adapter, by their names in the base model (`model.layers.0.self_attn.q_proj`).
    pub fn modules(&self) -> impl Iterator<Item = (&str, &PeftModule)> {
        self.modules.iter().map(|(name, module)| (name.as_str(), module))
    }

    /// The adapter of a module.
    #[must_use]
    pub fn module(&self, name: &str) -> Option<&PeftModule> {
        self.modules.get(name)
    }

    /// The modules with adapters of parameters (`target_parameters`), and the number of these.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, usize)> {
        self.parameters.iter().map(|(name, factors)| (name.as_str(), factors.len()))
    }

    /// The pairs of the parameters of a module, the outermost first.
    pub(in super::super) fn factors(&self, module: &str) -> &[Factors] {
        self.parameters.get(module).map_or(&[], Vec::as_slice)
    }

    /// Embeddings of which some rows were trained (`trainable_token_indices`), by module.
    #[must_use]
    pub fn tokens(&self) -> &BTreeMap<String, AdaptedTokens> {
        &self.tokens
    }

    /// Tensors of the base model that were trained as a whole (`modules_to_save`, biases, resized embeddings), by their
    /// names in the base model, whose tensors they replace.
    #[must_use]
    pub fn replaced(&self) -> &TensorMap<'static> {
        &self.replaced
    }

    /// Where in the name of a replaced tensor that of `modules_to_save` begins; `None` if that does not name it.
    pub(in super::super) fn saved_from(&self, tensor: &str) -> Option<usize> {
        self.saved.get(tensor).copied()
    }

    /// Tensors of the base model as they were under the adapter, which PEFT saves where the base may have others: what
    /// the adapter adds is added to these.
    pub(in super::super) fn bases(&self) -> &TensorMap<'static> {
        &self.bases
    }

    /// Makes the layer `module` of a model: a 4-bit base with this adapter, and with the bias that the adapter has for it.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] if the adapter has nothing for this module; [`CheckpointError::Unsupported`] for an
    /// embedding or a convolution; [`CheckpointError::Layer`] if it was made for a weight of another shape.
    pub fn layer(&self, module: &str, base: Linear4bit) -> Result<QLoRALayer, CheckpointError> {
        let found = self.modules.get(module);
        let found = found.ok_or_else(|| CheckpointError::Missing { tensor: tensor_name(module, "lora_A.weight") })?;
        if found.kind != PeftModuleKind::Linear {
            let variant = format!("{:?} as a layer", found.kind);
            return Err(CheckpointError::Unsupported { what: module.to_owned(), variant });
        }
        let error = |error| CheckpointError::Layer { layer: module.to_owned(), error };
        let (weight, bias) = base.into_parts();
        let bias = self.add_to_bias(module, found, self.trained_bias(module)?.or(bias))?;
        let layer = QLoRALayer::from_parts(weight, found.adapter.clone()).map_err(error)?;
        match bias {
            Some(bias) => layer.with_bias(bias).map_err(error),
            None => Ok(layer),
        }
    }

    /// The bias of the base that was trained with the adapter, or that it was made for.
    fn trained_bias(&self, module: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        let name = format!("{module}.bias");
        let found = [&self.replaced, &self.bases].into_iter().find(|tensors| tensors.contains_key(&name));
        found.map(|tensors| Ok(read_floats(tensors, &name)?.0)).transpose()
    }

    /// `bias + scale * lora_bias`, rounded once, or `None` if there is neither.
    fn add_to_bias(
        &self,
        module: &str,
        found: &PeftModule,
        bias: Option<Vec<f32>>,
    ) -> Result<Option<Vec<f32>>, CheckpointError> {
        let Some(added) = &found.bias else { return Ok(bias) };
        let mut bias = bias.unwrap_or_else(|| alloc::vec![0.0; added.len()]);
        if bias.len() != added.len() {
            let tensor = format!("{module}.bias");
            let (expected, got) = (alloc::vec![added.len()], alloc::vec![bias.len()]);
            return Err(CheckpointError::Shape { tensor, expected, got });
        }
        let scale = f64::from(found.adapter.scale());
        let sum = |b: f32, a: f32| crate::round::to_f32(f64::from(b) + scale * f64::from(a));
        bias.iter_mut().zip(added).for_each(|(b, a)| *b = sum(*b, *a));
        Ok(Some(bias))
    }
}

/// The name of a tensor in `adapter_model.safetensors`.
pub(super) fn tensor_name(module: &str, part: &str) -> String {
    format!("{PREFIX}{module}.{part}")
}

/// Bytes that live as long as the adapter.
pub(super) type OwnedBytes = Cow<'static, [u8]>;
