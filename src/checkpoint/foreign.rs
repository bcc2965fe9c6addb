//! Weights in packed formats other than the 4 bits of `bitsandbytes`, recognized by the names of tensors, and by types that
//! no plain weight has.
//!
//! Names are those that the loaders of transformers 5 look for (`quantizers/`, `integrations/`), and of `compressed-tensors`
//! and `ModelOpt`.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::error::CheckpointError;
use super::names::join;
use super::quant_state::described;
use super::source::TensorSource;

/// A tensor in a packed format that this library does not decode, such as GPTQ or FP8, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignTensor {
    /// Its name.
    pub name: String,
    /// The format, as far as names and types tell.
    pub format: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl ForeignTensor {
    /// The error for this tensor.
    #[must_use]
    pub fn error(&self, why: &str) -> CheckpointError {
        let reason = format!("{} {:?} {why}", self.dtype, self.shape);
        CheckpointError::Foreign { tensor: self.name.clone(), format: self.format.clone(), reason }
    }
}

/// Finds all tensors of a source in packed formats other than the 4 bits of `bitsandbytes`, sorted by name.
#[must_use]
pub fn foreign_tensors(source: &dyn TensorSource) -> Vec<ForeignTensor> {
    let packed: alloc::collections::BTreeSet<&str> = source.names().filter_map(described).collect();
    let foreign = |name: &str| {
        if described(name).is_some() || packed.contains(name) {
            return None;
        }
        let info = source.info(name)?;
        let format = by_name(source, name, info).map(str::to_owned).or_else(|| by_type(name, info))?;
        Some(ForeignTensor { name: name.to_owned(), format, dtype: info.dtype, shape: info.shape.clone() })
    };
    let mut tensors: Vec<ForeignTensor> = source.names().filter_map(foreign).collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Last parts of names that say by themselves what they belong to.
const PARTS: [(&str, &str); 30] = [
    ("SCB", "int8 of bitsandbytes"),
    ("weight_format", "int8 of bitsandbytes"),
    ("qweight", "GPTQ or AWQ"),
    ("qzeros", "GPTQ or AWQ"),
    ("g_idx", "GPTQ or AWQ"),
    ("weight_scale_inv", "FP8"),
    ("weight_scale", "FP8 or compressed-tensors"),
    ("weight_scale_2", "NVFP4 of ModelOpt"),
    ("weight_packed", "compressed-tensors"),
    ("weight_global_scale", "compressed-tensors"),
    ("weight_zero_point", "compressed-tensors"),
    ("weight_g_idx", "compressed-tensors"),
    ("weight_shape", "compressed-tensors"),
    ("input_global_scale", "compressed-tensors"),
    ("input_scale", "FP8 or compressed-tensors"),
    ("activation_scale", "FP8"),
    ("weight_scales", "EETQ"),
    ("W_q", "HQQ"),
    ("codebooks", "AQLM"),
    ("centroids", "VPTQ"),
    ("res_centroids", "VPTQ"),
    ("dense_weights", "SpQR"),
    ("row_offsets", "SpQR"),
    ("col_vals", "SpQR"),
    ("dqweight", "FP-Quant"),
    ("tables2", "HIGGS"),
    ("weight_qdata", "torchao"),
    ("_data", "quanto"),
    ("_scale", "quanto"),
    ("_shift", "quanto"),
];

/// Last parts that belong to a format only where another part stands beside them.
const COMPANIONS: [(&str, &str, &str); 11] = [
    ("scales", "qweight", "GPTQ or AWQ"),
    ("scale", "W_q", "HQQ"),
    ("zero", "W_q", "HQQ"),
    ("meta", "W_q", "HQQ"),
    ("nbits", "W_q", "HQQ"),
    ("group_size", "W_q", "HQQ"),
    ("axis", "W_q", "HQQ"),
    ("codes", "codebooks", "AQLM"),
    ("scales", "codebooks", "AQLM"),
    ("indices", "centroids", "VPTQ"),
    ("weight", "SCB", "int8 of bitsandbytes"),
];

fn by_name(source: &dyn TensorSource, name: &str, info: &TensorInfo) -> Option<&'static str> {
    let (module, part) = name.rsplit_once('.').unwrap_or(("", name));
    // A bias is plain in every format.
    if part == "bias" && is_float(info.dtype) {
        return None;
    }
    if let Some((_, format)) = PARTS.iter().find(|(known, _)| *known == part) {
        return Some(format);
    }
    let beside = |other: &str| source.info(&join(module, other)).is_some();
    if let Some((.., format)) = COMPANIONS.iter().find(|(known, other, _)| *known == part && beside(other)) {
        return Some(format);
    }
    for (end, other) in [("_blocks", "_scales"), ("_scales", "_blocks")] {
        if let Some(stem) = part.strip_suffix(end)
            && beside(&format!("{stem}{other}"))
        {
            return Some("MXFP4");
        }
    }
    part.ends_with("_scale_inv").then_some("FP8")
}

/// Whether a plain weight can have this type.
fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// What a type says of a tensor whose name says nothing.
fn by_type(name: &str, info: &TensorInfo) -> Option<String> {
    let part = name.rsplit('.').next().unwrap_or(name);
    let undescribed = || Some(format!("{} data without a description", info.dtype));
    match info.dtype {
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ => {
            Some("FP8".to_owned())
        }
        dtype if dtype.bitsize() < 8 => undescribed(),
        Dtype::U8 | Dtype::I8 if !is_mask(part) && !is_index(part) => undescribed(),
        Dtype::I16 | Dtype::U16 | Dtype::I32 | Dtype::U32 if part == "weight" => undescribed(),
        Dtype::I16 | Dtype::U16 | Dtype::I32 | Dtype::U32
            if info.shape.len() > 1 && !is_mask(part) && !is_index(part) =>
        {
            undescribed()
        }
        Dtype::I64 | Dtype::U64 if part == "weight" => undescribed(),
        _ => None,
    }
}

/// The masks of attention that older models of GPT keep as bytes.
fn is_mask(part: &str) -> bool {
    part == "bias" || part == "masked_bias" || part.contains("mask")
}

/// Tables of numbers, which are integers in a plain model too.
fn is_index(part: &str) -> bool {
    ["ids", "index", "indices", "idx", "position", "count", "tracked", "length"].iter().any(|word| part.contains(word))
}
