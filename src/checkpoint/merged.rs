//! A model with plain weights only: 4-bit tensors are dequantized, and an adapter is merged.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::float::FloatType;
use super::peft::PeftAdapter;
use super::plan::{MergeOptions, Note, Origin, Plan};
use super::read::with_room;
use super::reader::TensorReader;
use super::source::TensorSource;

/// A model whose 4-bit weights are dequantized and into which an adapter, if there is one, is merged.
///
/// It is a [`TensorSource`]: types and shapes are known at once, and each tensor is computed when it is read.
/// [`write_safetensors`] and [`write_gguf`] write it to a file; [`Self::open`] computes a tensor in parts.
///
/// A weight is `dequantize(base) + scale * B A`, with `DoRA` each row times its magnitude over its norm, rounded once
/// to f32 and once more to f16 or bf16. Names, shapes and values are those of PEFT's model with the adapter: a tied output
/// head of which only one side was trained gets a weight of its own, a head that only the adapter has is added, a vocabulary
/// may grow. [`Self::notes`] lists the differences from the base, and [`Self::config`] is the `config.json` that goes with
/// the merged model.
///
/// Reading a merged weight takes its bytes, those of the packed weight, of the adapter, and some rows of f32.
///
/// A writer that gets the file piece by piece, so that only one tensor is in memory at a time:
///
/// ```
/// use std::io::Write;
/// use nf4::checkpoint::{CheckpointError, FloatType, MergeOptions, MergedModel};
/// use nf4::checkpoint::{PeftAdapter, write_safetensors};
/// # use nf4::checkpoint::{Linear4bit, TensorFile};
/// # use nf4::{BlockSize, LoRAAdapter, LoRAScaling, Quantized4Bit};
/// # let weight = Quantized4Bit::quantize(&[0.5_f32; 32 * 64], 32, 64, BlockSize::B64, true)?;
/// # let layer = Linear4bit::new(weight, FloatType::BF16);
/// # let (model, mut file) = (layer.tensors("mlp.up_proj"), Vec::new());
/// # let adapter = LoRAAdapter::new(32, 64, 4, 8.0, LoRAScaling::Standard, 0)?;
/// # let adapter = PeftAdapter::new([("mlp.up_proj".to_owned(), adapter)])?;
/// // `model`: any `TensorSource`; `adapter`: a `PeftAdapter`; `file`: a `std::fs::File`
/// let options = MergeOptions::new().with_dtype(FloatType::BF16);
/// let merged = MergedModel::new(&model, Some(&adapter), &options)?;
/// write_safetensors(&merged, &mut |bytes| {
///     let failed = |error: std::io::Error| CheckpointError::Write { reason: error.to_string() };
///     file.write_all(bytes).map_err(failed)
/// })?;
/// assert_eq!(merged.merged(), ["mlp.up_proj"]);
/// # assert_eq!(TensorFile::parse(&file)?.header().iter().count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`write_safetensors`]: super::write_safetensors
/// [`write_gguf`]: super::write_gguf
#[doc(alias = "merge_and_unload")]
#[derive(Clone)]
pub struct MergedModel<'a> {
    source: &'a dyn TensorSource,
    adapter: Option<&'a PeftAdapter>,
    plan: Plan,
    allows_overflow: bool,
}

impl core::fmt::Debug for MergedModel<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MergedModel").field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl<'a> MergedModel<'a> {
    /// Merges `adapter` into the model in `source`. Only the descriptions of tensors are read here.
    ///
    /// # Errors
    /// * [`CheckpointError::Json`] for the configuration;
    /// * [`CheckpointError::Foreign`] if something is packed in another format and could not be loaded afterwards, or is to
    ///   be merged into;
    /// * [`CheckpointError::NotInModel`] for a module or tensor of the adapter that the model does not have;
    /// * [`CheckpointError::Layer`] and [`CheckpointError::Shape`] for one of another shape;
    /// * [`CheckpointError::Missing`] for a base bias that a `lora_bias` needs, as in PEFT;
    /// * [`CheckpointError::Type`] for one that is not made of floats;
    /// * [`CheckpointError::Unexpected`] for what can mean more than one thing;
    /// * what [`QuantState::load`](super::QuantState::load) returns for a 4-bit tensor.
    pub fn new(
        source: &'a dyn TensorSource,
        adapter: Option<&'a PeftAdapter>,
        options: &MergeOptions<'_>,
    ) -> Result<Self, CheckpointError> {
        let plan = Plan::new(source, adapter, options)?;
        Ok(Self { source, adapter, plan, allows_overflow: options.allows_overflow() })
    }

    /// Opens a tensor for computing it in parts.
    ///
    /// # Errors
    /// What the source returns; [`CheckpointError::Missing`]; [`CheckpointError::Codebook`] and [`CheckpointError::Layer`] for
    /// what is wrong with a 4-bit tensor; [`CheckpointError::Memory`].
    pub fn open(&self, name: &str) -> Result<TensorReader<'_>, CheckpointError> {
        let Some((name, planned)) = self.plan.tensors.get_key_value(name) else {
            return Err(CheckpointError::Missing { tensor: name.into() });
        };
        TensorReader::new(name, planned, self.source, self.adapter, self.allows_overflow)
    }

    /// The tensor of the base that a tensor replaces: it has the same name, or the tensor starts from it.
    #[must_use]
    pub fn home(&self, name: &str) -> Option<&str> {
        let (name, planned) = self.plan.tensors.get_key_value(name)?;
        match &planned.origin {
            Origin::Base(tensor) | Origin::Packed(tensor) => Some(tensor),
            _ => self.source.info(name).map(|_| name.as_str()),
        }
    }

    /// The text of the `config.json` of this model, if [`MergeOptions::with_config`] gave that of the base: without
    /// `quantization_config`, with the type, ties, number of words and class of the merged model.
    ///
    /// # Errors
    /// [`CheckpointError::Json`], which no configuration gives that was read.
    pub fn config(&self) -> Result<Option<String>, CheckpointError> {
        self.plan.config()
    }

    /// The differences from the base, other than values.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.plan.notes
    }

    /// The modules with an adapter, by their names in the model, sorted.
    #[must_use]
    pub fn merged(&self) -> &[String] {
        &self.plan.merged
    }

    /// The number of 4-bit tensors of the base.
    #[must_use]
    pub fn dequantized(&self) -> usize {
        self.plan.dequantized
    }

    /// The type of the weights: the one that [`MergeOptions::with_dtype`] set, or that of most of them.
    #[must_use]
    pub fn dtype(&self) -> FloatType {
        self.plan.dtype
    }
}

impl TensorSource for MergedModel<'_> {
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.plan.tensors.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.plan.tensors.get(name).map(|planned| &planned.info)
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        /// Bytes that are computed at a time.
        const PART: usize = 1 << 18;
        let reader = self.open(name)?;
        let mut bytes: Vec<u8> = with_room(name, reader.units().saturating_mul(reader.unit_bytes()))?;
        let step = (PART / reader.unit_bytes().max(1)).max(1);
        for start in (0..reader.units()).step_by(step) {
            reader.read(start..reader.units().min(start + step), &mut bytes)?;
        }
        Ok(Cow::Owned(bytes))
    }
}
