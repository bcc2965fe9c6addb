//! Quantized weights with their owner: what a `bitsandbytes` state dict holds, and what quantizing gives.

use nf4::{Absmax, BlockSize, CODEBOOK, DYNAMIC_MAP, Kernels, NESTED_BLOCK, NestedAbsmax, Nf4Matrix, packed_len};

use super::tensors::{Tensor, Tensors, with_float};

/// Double-quantized absmax.
#[derive(Debug, Clone)]
pub(crate) struct NestedScales {
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
    pub(crate) map: Box<[f32; 256]>,
    pub(crate) offset: f32,
}

impl NestedScales {
    /// From the tensors `absmax_codes`, `nested_absmax`, `offset` and, if it is there, `nested_code`.
    pub(crate) fn from_reference(file: &Tensors) -> Self {
        let map = file.find("nested_code").map_or_else(|| Box::new(DYNAMIC_MAP), map_of);
        Self {
            codes: file.values("absmax_codes"),
            absmax: file.values("nested_absmax"),
            map,
            offset: file.get("offset").scalar(),
        }
    }

    pub(crate) fn absmax(&self) -> Absmax<'_> {
        Absmax::Nested(NestedAbsmax::new(&self.codes, &self.map, &self.absmax, self.offset).unwrap())
    }
}

/// The absmax of a layer.
#[derive(Debug, Clone)]
pub(crate) enum Scales {
    Plain(Vec<f32>),
    Nested(NestedScales),
}

impl Scales {
    pub(crate) fn absmax(&self) -> Absmax<'_> {
        match self {
            Self::Plain(absmax) => Absmax::Plain(absmax),
            Self::Nested(nested) => nested.absmax(),
        }
    }

    /// One f32 a block.
    pub(crate) fn restored(&self) -> Vec<f32> {
        let absmax = self.absmax();
        let mut out = vec![0.0; absmax.len()];
        absmax.dequantize(0, &mut out).unwrap();
        out
    }
}

/// A quantized matrix.
#[derive(Debug, Clone)]
pub(crate) struct Quantized {
    pub(crate) packed: Vec<u8>,
    pub(crate) scales: Scales,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) block_size: BlockSize,
}

impl Quantized {
    /// Reads the weight with this key (`weight`, `model.layers.0.mlp.up_proj.weight`) of a `bitsandbytes` state dict.
    pub(crate) fn from_state_dict(file: &Tensors, key: &str) -> Self {
        let tensor = |suffix: &str| file.get(&format!("{key}.{suffix}"));
        let state = tensor("quant_state.bitsandbytes__nf4");
        let state: serde_json::Value = serde_json::from_slice(state.bytes()).unwrap();
        let number = |field: &str| usize::try_from(state[field].as_u64().unwrap()).unwrap();
        assert_eq!(state["quant_type"], "nf4", "{key}");
        assert_eq!(tensor("quant_map").values::<f32>(), CODEBOOK, "{key}.quant_map");
        let shape: Vec<usize> =
            state["shape"].as_array().unwrap().iter().map(|d| usize::try_from(d.as_u64().unwrap()).unwrap()).collect();
        let scales = if state.get("nested_blocksize").is_none() {
            Scales::Plain(tensor("absmax").values())
        } else {
            assert_eq!(number("nested_blocksize"), NESTED_BLOCK, "{key}: nested_blocksize");
            Scales::Nested(NestedScales {
                codes: tensor("absmax").values(),
                absmax: tensor("nested_absmax").values(),
                map: map_of(tensor("nested_quant_map")),
                offset: to_f32(state["nested_offset"].as_f64().unwrap()),
            })
        };
        Self {
            packed: file.get(key).bytes().to_vec(),
            scales,
            rows: shape[..shape.len() - 1].iter().product(),
            cols: shape[shape.len() - 1],
            block_size: BlockSize::new(number("blocksize")).unwrap(),
        }
    }

    pub(crate) fn matrix(&self) -> Nf4Matrix<'_> {
        Nf4Matrix::new(&self.packed, self.scales.absmax(), self.rows, self.cols, self.block_size).unwrap()
    }

    /// The weights as f32, row-major.
    pub(crate) fn dequantized(&self, kernels: Kernels) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        kernels.dequantize(&self.matrix(), &mut out).unwrap();
        out
    }
}

/// Packed codes and absmax of a tensor of any weights' float type.
pub(crate) fn quantize(kernels: Kernels, weights: &Tensor, block_size: BlockSize) -> (Vec<u8>, Vec<f32>) {
    let elements = weights.shape.iter().product();
    // Filled with what no result consists of, so that an element left out is seen.
    let (mut packed, mut absmax) = (vec![0xa5; packed_len(elements)], vec![-1.0; block_size.blocks(elements)]);
    with_float!(weights.dtype, T => {
        kernels.quantize(&weights.values::<T>(), block_size, &mut packed, &mut absmax).unwrap();
    });
    (packed, absmax)
}

/// Codes and scales of double quantization, with the offset given or computed.
pub(crate) fn quantize_absmax(kernels: Kernels, absmax: &[f32], offset: Option<f32>) -> NestedScales {
    let (mut codes, mut nested) = (vec![0xa5; absmax.len()], vec![-1.0; absmax.len().div_ceil(NESTED_BLOCK)]);
    let offset = match offset {
        Some(offset) => {
            kernels.quantize_absmax_with_offset(absmax, offset, &mut codes, &mut nested).unwrap();
            offset
        }
        None => kernels.quantize_absmax(absmax, &mut codes, &mut nested).unwrap(),
    };
    NestedScales { codes, absmax: nested, map: Box::new(DYNAMIC_MAP), offset }
}

/// The 256 entries of a quant map.
fn map_of(tensor: &Tensor) -> Box<[f32; 256]> {
    tensor.values().try_into().unwrap()
}

#[allow(clippy::cast_possible_truncation, reason = "the file holds the decimal of an f32")]
fn to_f32(x: f64) -> f32 {
    x as f32
}
