//! A frozen 4-bit weight.

use std::fmt;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use candle_nn::Module;
use nf4::checkpoint::Linear4bit;
use nf4::{Adapters, Arithmetic, Gradients, Kernels, MultiAdapterLayer, Quantized4Bit, ShapeError, Threads};
use rayon::prelude::*;

use crate::values::{Element, Fill, filled, floats, output_shape, with_floats, wrap};

const OP: &str = "nf4-linear";

/// `y = W x + bias` with a frozen NF4 weight `W` `[d_out, d_in]`, multiplied on its packed bytes.
///
/// The gradient of the input is `dy W`, from the packed bytes: in f32 if that is the arithmetic of the layer, and else by the
/// transposed 16x4 product. Weight and bias get none. See the crate for types and shapes.
#[derive(Clone)]
pub struct Nf4Linear(Arc<MultiAdapterLayer>);

impl Nf4Linear {
    /// A layer of a weight and a bias, `[d_out]`.
    ///
    /// # Errors
    /// [`nf4::Error::Shape`] and [`nf4::Error::NotFinite`] for the bias.
    pub fn new(weight: Quantized4Bit, bias: Option<Vec<f32>>) -> Result<Self> {
        let layer = MultiAdapterLayer::new(weight);
        let layer = if let Some(bias) = bias { layer.with_bias(bias).map_err(wrap)? } else { layer };
        Ok(Self(Arc::new(layer)))
    }

    /// A layer of a checkpoint of `bitsandbytes`.
    ///
    /// # Errors
    /// The errors of [`Self::new`], which a layer that was read does not give.
    pub fn from_checkpoint(layer: Linear4bit) -> Result<Self> {
        let (weight, bias) = layer.into_parts();
        Self::new(weight, bias)
    }

    /// The same layer with another arithmetic of the forward than [`Arithmetic::SixteenByFour`].
    #[must_use]
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        let layer = Arc::unwrap_or_clone(self.0);
        Self(Arc::new(layer.with_arithmetic(arithmetic)))
    }

    /// The same layer on a pool of threads.
    #[must_use]
    pub fn with_threads(self, threads: Arc<dyn Threads>) -> Self {
        Self(Arc::new(Arc::unwrap_or_clone(self.0).with_threads(threads)))
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Quantized4Bit {
        self.0.base_weight_quantized()
    }

    /// The bias, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&[f32]> {
        self.0.bias()
    }

    /// The layer of the library, for forwards on slices.
    #[must_use]
    pub fn layer(&self) -> &MultiAdapterLayer {
        &self.0
    }

    /// The gradient of the input, `dx = dy W`, from that of the output: `dy` `[batch, d_out]`, `dx` `[batch, d_in]`.
    ///
    /// # Errors
    /// [`nf4::Error::Shape`] for other lengths.
    pub fn backward_into(&self, dy: &[f32], dx: &mut [f32]) -> Result<()> {
        transposed(&self.0, dy, dx).map_err(wrap)
    }

    fn shape(&self) -> [usize; 2] {
        [self.0.d_out(), self.0.d_in()]
    }
}

impl Module for Nf4Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(self.clone())
    }
}

impl CustomOp1 for Nf4Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = output_shape(OP, layout.shape(), self.shape())?;
        let forward = Forward { layer: &self.0, x: &floats(OP, x, layout)? };
        Ok((filled(OP, x.dtype(), shape.elem_count(), forward)?, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let mut dx = vec![0.0; x.elem_count()];
        with_floats(OP, dy, |dy| self.backward_into(dy, &mut dx))?;
        Tensor::from_vec(dx, x.shape(), x.device())?.to_dtype(x.dtype()).map(Some)
    }
}

impl fmt::Debug for Nf4Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [d_out, d_in] = self.shape();
        write!(f, "Nf4Linear({d_out}, {d_in})")
    }
}

struct Forward<'a> {
    layer: &'a MultiAdapterLayer,
    x: &'a [f32],
}

impl Fill for Forward<'_> {
    fn fill<Y: Element>(self, y: &mut [Y]) -> std::result::Result<(), nf4::Error> {
        let Self { layer, x } = self;
        let batch = x.len() / layer.d_in().max(1);
        let mut scratch = nf4::Scratch::new();
        let weight = layer.base_weight_quantized();
        scratch.reserve(layer.d_out(), layer.d_in(), weight.block_size(), 0, batch)?;
        layer.forward_into(x, Adapters::Active, &mut scratch, y)
    }
}

/// `dx = dy W`, `dy` `[batch, d_out]`: each thread takes some vectors, and each vector has the same bits in any batch.
fn transposed(layer: &MultiAdapterLayer, dy: &[f32], dx: &mut [f32]) -> std::result::Result<(), ShapeError> {
    let (d_out, d_in) = (layer.d_out(), layer.d_in());
    if dy.is_empty() || dx.is_empty() {
        dx.fill(0.0);
        return Ok(());
    }
    let (matrix, kernels) = (layer.base_weight_quantized().view(), Kernels::detect());
    let part = (dy.len() / d_out).div_ceil(rayon::current_num_threads());
    let parts = dy.par_chunks(part * d_out).zip(dx.par_chunks_mut(part * d_in));
    if layer.arithmetic() == Arithmetic::F32 {
        return parts.try_for_each(|(dy, dx)| kernels.gemm_transposed_f32(&matrix, dy, dx));
    }
    parts.try_for_each(|(dy, dx)| {
        let batch = dy.len() / d_out;
        let mut values = vec![0; batch * Gradients::values_len(d_out)];
        let mut scales = vec![0.0; batch * Gradients::scales_len(d_out)];
        kernels.gemm_transposed(&matrix, &kernels.quantize_gradients(dy, d_out, &mut values, &mut scales)?, dx)
    })
}
