//! A tensor of a model as a flat row of f32 values, whatever it is stored as.

use core::ops::Range;

use anyhow::{Context, Result};
use nf4::checkpoint::{FloatType, Linear4bit};
use nf4::{Absmax, Kernels, NESTED_BLOCK, Nf4Matrix};

use crate::layers::{Layers, load};
use crate::memory;
use crate::model::Model;
use crate::shard::Shard;

/// Where values come from.
#[derive(Debug)]
pub(crate) enum Flat<'a> {
    /// A float tensor, read in parts, or as a whole if its rows are the columns of the file.
    Dense { shard: &'a Shard, name: &'a str, float: FloatType, shape: Vec<usize>, transposed: bool },
    /// A 4-bit layer, in memory.
    Packed(Box<Linear4bit>),
    /// Anything else.
    Other { shard: &'a Shard, name: &'a str, shape: Vec<usize> },
}

impl<'a> Flat<'a> {
    /// The tensor of this name, or the 4-bit layer whose weight it is.
    pub(crate) fn open(model: &'a Model, layers: &Layers, name: &'a str) -> Result<Self> {
        if layers.by_tensor.contains_key(name) {
            return Ok(Self::Packed(Box::new(load(model, name)?)));
        }
        let (shard, info) = model.find(name).with_context(|| format!("{}: no tensor {name}", model.path.display()))?;
        let shape = info.shape.clone();
        Ok(match FloatType::from_dtype(info.dtype) {
            Some(float) => Self::Dense { shard, name, float, shape, transposed: false },
            None => Self::Other { shard, name, shape },
        })
    }

    /// Makes a matrix in floats the transposed one.
    pub(crate) fn transpose(&mut self) {
        if let Self::Dense { shape, transposed, .. } = self
            && shape.len() == 2
        {
            shape.reverse();
            *transposed = !*transposed;
        }
    }

    /// The shape before packing.
    pub(crate) fn shape(&self) -> &[usize] {
        match self {
            Self::Dense { shape, .. } | Self::Other { shape, .. } => shape,
            Self::Packed(layer) => &layer.state().shape,
        }
    }

    /// What it is, for messages.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Dense { float, .. } => float.dtype().to_string(),
            Self::Packed(_) => "NF4".to_owned(),
            Self::Other { shard, name, .. } => shard.header.get(name).map_or_else(String::new, |i| i.dtype.to_string()),
        }
    }

    /// Number of values; of bytes for what is neither a layer nor a float tensor.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Dense { shape, .. } => shape.iter().product(),
            Self::Packed(layer) => layer.weight().len(),
            Self::Other { shard, name, .. } => {
                shard.header.get(name).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0)
            }
        }
    }

    /// Whether values can be had in parts of whole blocks. If not there is one part.
    pub(crate) fn is_divisible(&self) -> bool {
        match self {
            Self::Packed(layer) => layer.weight().len().is_multiple_of(layer.weight().block_size().get()),
            Self::Dense { transposed, .. } => !transposed,
            Self::Other { .. } => true,
        }
    }

    /// The values of a range that starts and ends at blocks, or of all if [`Self::is_divisible`] is false. Bytes count as
    /// values where there are no floats.
    pub(crate) fn values(&self, range: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Dense { shard, name, float, shape, transposed } => {
                let mut bytes = memory::filled(range.len() * float.size(), 0)?;
                shard.read_part(name, (range.start * float.size()) as u64, &mut bytes)?;
                let mut values = memory::filled(range.len(), 0.0)?;
                values.clear();
                float.extend_values(&bytes, &mut values);
                if let (true, [rows, cols]) = (transposed, &**shape) {
                    let columns = memory::filled(range.len(), 0.0)?;
                    let stored = core::mem::replace(&mut values, columns);
                    let at = |i: usize| i % cols * rows + i / cols;
                    values.iter_mut().enumerate().for_each(|(i, value)| *value = stored[at(i)]);
                }
                Ok(values)
            }
            Self::Other { shard, name, .. } => {
                let (mut bytes, mut values) = (memory::filled(range.len(), 0)?, memory::filled(range.len(), 0.0)?);
                shard.read_part(name, range.start as u64, &mut bytes)?;
                values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = byte.into());
                Ok(values)
            }
            Self::Packed(layer) => {
                let weight = layer.weight();
                let mut values = memory::filled(range.len(), 0.0)?;
                // Blocks as rows, if all are whole; else there is one row.
                let cols = if self.is_divisible() { weight.block_size().get() } else { weight.len() };
                let (rows, absmax) = (weight.len() / cols.max(1), weight.absmax().view());
                let blocks = Nf4Matrix::new(weight.packed(), absmax, rows, cols, weight.block_size())?;
                let part = range.start / cols.max(1)..range.end / cols.max(1);
                Kernels::detect().dequantize(&blocks.row_range(part)?, &mut values)?;
                Ok(values)
            }
        }
    }
}

/// Half the widest gap of the NF4 codebook, which lies between its first two values: no weight of a block is farther
/// from its restored value, in units of the block's absmax.
const HALF_GAP: f32 = 0.151_904;

/// The widest gap between values of the dynamic map, which codes the scales of scales: the CPU quantizer of
/// bitsandbytes takes one of the two neighbours of a value.
const NESTED_GAP: f32 = 0.014_2;

/// What F16 and BF16 round away, relative to the largest weight of a block: half an ulp of BF16, and as much for a
/// difference of the two roundings.
const ROUNDING: f32 = 1.0 / 128.0;

/// The first value of `dense` from `start` on that the layer cannot have been quantized from: its index, and the
/// distance from the restored value and the largest one possible.
pub(crate) fn out_of_reach(
    layer: &Linear4bit,
    start: usize,
    dense: &[f32],
    restored: &[f32],
) -> Option<(usize, f32, f32)> {
    let weight = layer.weight();
    let (size, scales) = (weight.block_size().get(), weight.absmax().view());
    for (i, (dense, restored)) in dense.chunks(size).zip(restored.chunks(size)).enumerate() {
        let block = start / size + i;
        let absmax = dense.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
        let nested = match scales {
            Absmax::Nested(nested) => NESTED_GAP * nested.absmax()[block / NESTED_BLOCK],
            _ => 0.0,
        };
        let allowed = (HALF_GAP + ROUNDING) * absmax + nested + 1e-38;
        let far = |(w, r): (&f32, &f32)| {
            let distance = (w - r).abs();
            distance.is_nan() || distance > allowed
        };
        if let Some(at) = dense.iter().zip(restored).position(far) {
            return Some((start + i * size + at, (dense[at] - restored[at]).abs(), allowed));
        }
    }
    None
}
