//! The linear layers of a block on slices: frozen, trained or dense.

use candle_core::{Device, Error, Result, Tensor};
use nf4::{Adapters, BackwardScratch, BlockSize, InputsBuf, QLoRALayer};
use nf4_candle::{Nf4Linear, QLoRALinear};

/// A layer of a model.
#[derive(Debug)]
pub(crate) enum Linear {
    Frozen(Nf4Linear),
    Trained(Box<QLoRALinear>),
    /// Left dense by a checkpoint that is quantized; it has no adapter.
    Dense {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    /// The layer with the values that the variables have now.
    pub(crate) fn ready(&self) -> Result<Ready> {
        Ok(match self {
            Self::Frozen(layer) => Ready::Frozen(layer.clone()),
            Self::Trained(layer) => Ready::Trained(Box::new(layer.layer()?)),
            Self::Dense { weight, bias } => Ready::Dense { weight: weight.clone(), bias: bias.clone() },
        })
    }
}

/// A layer for a forward and its backward.
#[derive(Debug)]
pub(crate) enum Ready {
    Frozen(Nf4Linear),
    Trained(Box<QLoRALayer>),
    Dense { weight: Tensor, bias: Option<Tensor> },
}

/// Buffers for any of them.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    inputs: InputsBuf,
    forward: nf4::Scratch,
    backward: BackwardScratch,
}

/// The outputs of layers with the same inputs `x` `[tokens, d_in]`, which are quantized once.
pub(crate) fn forward<const N: usize>(
    layers: [&Ready; N],
    x: &[f32],
    scratch: &mut Scratch,
    outputs: [&mut [f32]; N],
) -> Result<()> {
    let Scratch { inputs, forward, .. } = scratch;
    let packed = layers.iter().find_map(|layer| layer.block_size().map(|size| (layer, size)));
    let mut size_of_inputs = None;
    let inputs = match packed {
        Some((layer, size)) => {
            size_of_inputs = Some(size);
            inputs.reserve(layer.d_in()?, size, x.len() / layer.d_in()?).map_err(Error::wrap)?;
            Some(layer.quantize_inputs(x, inputs)?)
        }
        None => None,
    };
    for (layer, y) in layers.into_iter().zip(outputs) {
        let shared = inputs.as_ref().filter(|_| layer.block_size() == size_of_inputs);
        let tokens = x.len() / layer.d_in()?;
        match layer {
            Ready::Frozen(layer) => {
                let layer = layer.layer();
                let size = layer.base_weight_quantized().block_size();
                forward.reserve(layer.d_out(), layer.d_in(), size, 0, tokens).map_err(Error::wrap)?;
                match shared {
                    Some(inputs) => layer.forward_shared(inputs, Adapters::Active, forward, y),
                    None => layer.forward_into(x, Adapters::Active, forward, y),
                }
                .map_err(Error::wrap)?;
            }
            Ready::Trained(layer) => {
                let size = layer.base_weight_quantized().block_size();
                forward.reserve(layer.d_out(), layer.d_in(), size, layer.rank(), tokens).map_err(Error::wrap)?;
                match shared {
                    Some(inputs) => layer.forward_shared(inputs, forward, y),
                    None => layer.forward_into(x, forward, y),
                }
                .map_err(Error::wrap)?;
            }
            Ready::Dense { weight, bias } => {
                let x = Tensor::from_slice(x, (tokens, weight.dim(1)?), &Device::Cpu)?;
                let product = x.matmul(&weight.t()?)?;
                let product = if let Some(bias) = bias { product.broadcast_add(bias)? } else { product };
                y.copy_from_slice(&product.flatten_all()?.to_vec1()?);
            }
        }
    }
    Ok(())
}

impl Ready {
    fn d_in(&self) -> Result<usize> {
        match self {
            Self::Frozen(layer) => Ok(layer.weight().cols()),
            Self::Trained(layer) => Ok(layer.d_in()),
            Self::Dense { weight, .. } => weight.dim(1),
        }
    }

    /// Of packed weights.
    fn block_size(&self) -> Option<BlockSize> {
        match self {
            Self::Frozen(layer) => Some(layer.weight().block_size()),
            Self::Trained(layer) => Some(layer.base_weight_quantized().block_size()),
            Self::Dense { .. } => None,
        }
    }

    fn quantize_inputs<'b>(&self, x: &'b [f32], buffers: &'b mut InputsBuf) -> Result<nf4::Inputs<'b>> {
        match self {
            Self::Frozen(layer) => layer.layer().quantize_inputs(x, buffers).map_err(Error::wrap),
            Self::Trained(layer) => layer.quantize_inputs(x, buffers).map_err(Error::wrap),
            Self::Dense { .. } => Err(Error::Msg("dense weights are multiplied in f32".to_string())),
        }
    }

    /// Adds to the gradients of an adapter, from the inputs and the gradients of the outputs, and writes that of the inputs,
    /// if it is wanted.
    pub(crate) fn backward(
        &mut self,
        x: &[f32],
        dy: &[f32],
        scratch: &mut Scratch,
        dx: Option<&mut [f32]>,
    ) -> Result<()> {
        match (self, dx) {
            (Self::Trained(layer), dx) => {
                let (d_out, d_in, scratch) = (layer.d_out(), layer.d_in(), &mut scratch.backward);
                scratch.reserve(d_out, d_in, layer.rank(), x.len() / d_in).map_err(Error::wrap)?;
                layer.backward_into(x, dy, scratch, dx).map_err(Error::wrap)
            }
            (Self::Frozen(layer), Some(dx)) => {
                let (layer, scratch) = (layer.layer(), &mut scratch.backward);
                scratch.reserve(layer.d_out(), layer.d_in(), 0, dy.len() / layer.d_out()).map_err(Error::wrap)?;
                layer.base_backward_into(dy, scratch, dx).map_err(Error::wrap)
            }
            (Self::Dense { weight, .. }, Some(dx)) => {
                let rows = weight.dim(0)?;
                let dy = Tensor::from_slice(dy, (dy.len() / rows, rows), &Device::Cpu)?;
                dx.copy_from_slice(&dy.matmul(weight)?.flatten_all()?.to_vec1()?);
                Ok(())
            }
            (_, None) => Ok(()),
        }
    }

    /// The gradients of the adapter's variables, in their order; none without an adapter.
    pub(crate) fn into_gradients(self) -> Vec<Vec<f32>> {
        let Self::Trained(mut layer) = self else { return Vec::new() };
        let gradient = |of: &mut nf4::Tensor| of.grad().map_or_else(|| vec![0.0; of.len()], <[f32]>::to_vec);
        layer.trainable_params().into_iter().map(gradient).collect()
    }
}
