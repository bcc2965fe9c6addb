//! What a merged model consists of: for every tensor where its values come from, what is added to them, its shape and its
//! type. All of it is known before a weight is read, and both [`MergedModel`] and the tool only do what it says.
//!
//! [`MergedModel`]: super::MergedModel

mod adapt;
mod embeddings;
mod experts;
mod foreign;
mod matching;
mod note;
mod pairs;
mod task;
mod ties;

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::conv1d;
use super::error::CheckpointError;
use super::float::FloatType;
use super::foreign::{ForeignTensor, foreign_tensors};
use super::header::tensor_bytes;
use super::model_config::{Edits, ModelConfig};
use super::names::last;
use super::peft::PeftAdapter;
use super::quant_state::{QuantState, described, matrix_shape, packed_tensors};
use super::read::info_of;
use super::source::TensorSource;
pub use note::Note;

/// Where the values of a tensor come from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Origin {
    /// A plain tensor of the base.
    Base(String),
    /// A tensor of the base in 4 bits.
    Packed(String),
    /// A tensor that was trained as a whole.
    Replaced(String),
    /// A tensor of the base as the adapter has it.
    AdapterBase(String),
    /// The same, in 4 bits.
    AdapterPacked(String),
}

/// What is done to the values of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    /// A product of low rank is added to some rows, those of a matrix of [`Planned::matrix`].
    LowRank { rows: Range<usize>, pair: Pair },
    /// The rows of some tokens are replaced.
    Tokens { module: String },
}

/// A pair of an adapter, by the name of the adapter's module.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Pair {
    /// `B A`, or its transposed.
    Module { module: String, transposed: bool },
    /// `B`'s own bias, for a bias.
    Bias { module: String },
    /// The product for one expert of a parameter, from row `first` of it on.
    Expert {
        module: String,
        depth: usize,
        expert: usize,
        experts: usize,
        rank: usize,
        alpha: f64,
        first: usize,
        transposed: bool,
    },
}

/// A tensor of the merged model.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) info: TensorInfo,
    pub(super) origin: Origin,
    /// Rows and columns by which changes count.
    pub(super) matrix: [usize; 2],
    /// Whether the origin is transposed: 4-bit weights of a `Conv1D`.
    pub(super) transposed: bool,
    pub(super) changes: Vec<Change>,
}

/// Options of a [`MergedModel`]: the type of its floats, the `config.json` of its base, and whether values may overflow.
///
/// [`MergedModel`]: super::MergedModel
#[derive(Debug, Clone, Copy, Default)]
pub struct MergeOptions<'a> {
    dtype: Option<FloatType>,
    config: Option<&'a [u8]>,
    allows_overflow: bool,
}

impl<'a> MergeOptions<'a> {
    /// Every tensor keeps the type that it has in the base, 4-bit weights the one that they had before; there is no
    /// `config.json`; a value that a type turns into infinity is an error.
    #[must_use]
    pub const fn new() -> Self {
        Self { dtype: None, config: None, allows_overflow: false }
    }

    /// All floats get this type, except parameters that are F32 on purpose: those of a base whose weights are not F32,
    /// and those that transformers keeps in F32 whatever the model's type is.
    #[must_use]
    pub const fn with_dtype(self, dtype: FloatType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// The text of the model's `config.json`, which says what tensors do not: layouts, tied weights, other formats.
    #[must_use]
    pub const fn with_config(self, config: &'a [u8]) -> Self {
        Self { config: Some(config), ..self }
    }

    /// Finite values may become infinite.
    #[must_use]
    pub const fn with_overflow(self) -> Self {
        Self { allows_overflow: true, ..self }
    }

    pub(super) fn allows_overflow(&self) -> bool {
        self.allows_overflow
    }
}

/// The plan of a whole model.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) tensors: BTreeMap<String, Planned>,
    pub(super) notes: Vec<Note>,
    /// The modules with an adapter, by their names in the model.
    pub(super) merged: Vec<String>,
    /// The number of tensors that were in 4 bits.
    pub(super) dequantized: usize,
    pub(super) dtype: FloatType,
    config: Option<ModelConfig>,
}

impl Plan {
    pub(super) fn new(
        source: &dyn TensorSource,
        adapter: Option<&PeftAdapter>,
        options: &MergeOptions<'_>,
    ) -> Result<Self, CheckpointError> {
        let config = options.config.map(ModelConfig::parse).transpose()?;
        let mut builder = Builder::new(source, config)?;
        if let Some(adapter) = adapter {
            builder.is_adapted = true;
            builder.adapt(adapter)?;
        }
        builder.finish(options)
    }

    /// The text of the merged model's `config.json`, if the base has one.
    pub(super) fn config(&self) -> Result<Option<String>, CheckpointError> {
        self.config.as_ref().map(ModelConfig::to_text).transpose()
    }
}

/// A plan in the making. Until it is finished, `info.dtype` of a tensor is the type that it has if nothing is converted.
struct Builder<'a> {
    source: &'a dyn TensorSource,
    config: Option<ModelConfig>,
    /// Whether the model has layers of the class `Conv1D`.
    has_conv1d: bool,
    /// Whether parameters of experts are `[experts, in, out]` (`is_transposed` in transformers).
    has_transposed_experts: bool,
    foreign: Vec<ForeignTensor>,
    plan: BTreeMap<String, Planned>,
    /// The type of most weights.
    main: FloatType,
    dequantized: usize,
    /// Modules of the model with an adapter.
    merged: Vec<String>,
    /// Modules whose weights are not those of the base, without embeddings.
    touched: Vec<String>,
    is_adapted: bool,
    notes: Vec<Note>,
    edits: Edits,
}

impl<'a> Builder<'a> {
    /// The base alone.
    fn new(source: &'a dyn TensorSource, config: Option<ModelConfig>) -> Result<Self, CheckpointError> {
        let has_type =
            |types: &[&str]| config.iter().any(|config| config.model_types().any(|model| types.contains(&model)));
        let (has_conv1d, has_transposed_experts) = (has_type(&conv1d::TYPES), has_type(&TRANSPOSED_EXPERTS));
        let mut builder = Self {
            source,
            config,
            has_conv1d,
            has_transposed_experts,
            foreign: foreign_tensors(source),
            plan: BTreeMap::new(),
            main: FloatType::F32,
            dequantized: 0,
            merged: Vec::new(),
            touched: Vec::new(),
            is_adapted: false,
            notes: Vec::new(),
            edits: Edits::default(),
        };
        let mut weights = [0_usize; 3];
        let mut count = |dtype, [rows, cols]: [usize; 2]| {
            if let Some(float) = FloatType::from_dtype(dtype) {
                let slot = &mut weights[float as usize];
                *slot = slot.saturating_add(rows.saturating_mul(cols));
            }
        };
        for tensor in packed_tensors(source) {
            let state = QuantState::load(source, &tensor)?;
            count(state.dtype.dtype(), state.matrix_shape()?);
            let planned = builder.restored_tensor(&tensor, &state)?;
            builder.plan.insert(tensor, planned);
            builder.dequantized += 1;
        }
        for name in source.names().filter(|name| described(name).is_none()) {
            if !builder.plan.contains_key(name) {
                let info = info_of(source, name)?;
                count(info.dtype, matrix_shape(&info.shape));
                builder.plan.insert(name.to_owned(), planned(name, Origin::Base(name.to_owned()), info)?);
            }
        }
        let [f32, f16, bf16] = weights;
        builder.main = match () {
            () if f32 >= f16.max(bf16) => FloatType::F32,
            () if f16 >= bf16 => FloatType::F16,
            () => FloatType::BF16,
        };
        Ok(builder)
    }

    /// A 4-bit tensor of the base, in the layout that a plain one has.
    fn restored_tensor(&self, tensor: &str, state: &QuantState) -> Result<Planned, CheckpointError> {
        let mut info = TensorInfo { dtype: state.dtype.dtype(), shape: state.shape.clone(), data_offsets: (0, 0) };
        let is_conv1d = match &self.config {
            Some(_) => self.is_conv1d(tensor),
            // Whether such layers are transposed, the type of the model tells.
            None if conv1d::may_be(tensor) && info.shape.len() == 2 => {
                let variant =
                    "a 4-bit weight of this name without config.json, whose model_type says whether it is transposed,";
                return Err(CheckpointError::Unsupported { what: tensor.to_owned(), variant: variant.to_owned() });
            }
            None => false,
        };
        let mut planned = planned(tensor, Origin::Packed(tensor.to_owned()), &info)?;
        if is_conv1d && info.shape.len() == 2 {
            info.shape.reverse();
            planned.info.shape = info.shape;
            planned.transposed = true;
        }
        Ok(planned)
    }

    /// Whether a weight is that of a `Conv1D`, which transformers keeps as `[in, out]`, and transposes before it is
    /// quantized.
    fn is_conv1d(&self, tensor: &str) -> bool {
        self.has_conv1d && conv1d::has_name(tensor)
    }

    fn finish(mut self, options: &MergeOptions<'_>) -> Result<Plan, CheckpointError> {
        let keeps_foreign = self.check_foreign(options)?;
        let is_empty = |(name, planned): &(&String, &Planned)| planned.info.shape == [0] && last(name) == "weight";
        if let Some((name, _)) = self.plan.iter().find(is_empty) {
            return Err(CheckpointError::Unexpected { tensor: name.clone(), reason: NOT_GATHERED.to_owned() });
        }
        let main = self.main;
        for (name, planned) in &mut self.plan {
            let info = &mut planned.info;
            let own = float_of(info.dtype);
            let dtype = match (own, options.dtype) {
                (Some(own), Some(dtype)) if !(own == FloatType::F32 && stays_f32(main, name)) => Some(dtype),
                (own, _) => own,
            };
            // Integers, and F64 that nothing is done to, stay as they are.
            let is_kept = planned.changes.is_empty() && options.dtype.is_none();
            if let Some(dtype) = dtype.filter(|_| !(is_kept && info.dtype == Dtype::F64)) {
                info.dtype = dtype.dtype();
            }
            info.data_offsets = (0, tensor_bytes(name, info.dtype, &info.shape)?);
        }
        let dtype = options.dtype.unwrap_or(self.main);
        self.edits.dtype = dtype;
        self.edits.everywhere = options.dtype.is_some();
        self.edits.dequantized = !keeps_foreign;
        if let Some(config) = &mut self.config {
            config.edit(&self.edits);
        }
        let Self { plan, notes, merged, dequantized, config, .. } = self;
        Ok(Plan { tensors: plan, notes, merged, dequantized, dtype, config })
    }
}

/// What a weight of shape `[0]` means.
const NOT_GATHERED: &str =
    "shape [0]: an empty weight is what a DeepSpeed ZeRO-3 save leaves whose shards were not gathered";

/// A tensor whose values stay as they are.
fn planned(name: &str, origin: Origin, info: &TensorInfo) -> Result<Planned, CheckpointError> {
    let data_offsets = (0, tensor_bytes(name, info.dtype, &info.shape)?);
    let info = TensorInfo { dtype: info.dtype, shape: info.shape.clone(), data_offsets };
    let matrix = matrix_shape(&info.shape);
    Ok(Planned { info, origin, matrix, transposed: false, changes: Vec::new() })
}

/// Whether a tensor that is F32 in a base with weights of the type `main` is so on purpose.
fn stays_f32(main: FloatType, name: &str) -> bool {
    /// Of `_keep_in_fp32_modules_strict` in transformers, and of models that lose their meaning in 16 bits.
    const F32: [&str; 2] = ["e_score_correction_bias", "A_log"];
    main != FloatType::F32 || F32.contains(&last(name))
}

/// The type that a tensor is converted to if nothing else is asked for.
fn float_of(dtype: Dtype) -> Option<FloatType> {
    FloatType::from_dtype(dtype).or((dtype == Dtype::F64).then_some(FloatType::F32))
}

/// The model types whose parameters of experts are `[experts, in, out]`.
const TRANSPOSED_EXPERTS: [&str; 5] = ["gpt_oss", "aria", "aria_text", "openai_privacy_filter", "qwen3_vl_moe"];
