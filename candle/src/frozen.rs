//! A frozen 4-bit weight.

use std::fmt;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use candle_nn::Module;
use nf4::checkpoint::Linear4bit;
use nf4::{Adapters, Arithmetic, BackwardScratch, MultiAdapterLayer, Quantized4Bit, Threads};

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

    /// The layer of the library, for forwards and backwards on slices.
    #[must_use]
    pub fn layer(&self) -> &MultiAdapterLayer {
        &self.0
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
        let ([d_out, d_in], mut dx) = (self.shape(), vec![0.0; x.elem_count()]);
        with_floats(OP, dy, |dy| {
            let mut scratch = BackwardScratch::new();
            scratch.reserve(d_out, d_in, 0, dy.len() / d_out.max(1)).map_err(wrap)?;
            self.0.base_backward_into(dy, &mut scratch, &mut dx).map_err(wrap)
        })?;
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
