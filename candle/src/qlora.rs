//! A frozen 4-bit weight with a trained adapter.

use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::{Module, VarMap};
use nf4::{Absmax, AbsmaxBuf, Arithmetic, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Store, Threads};

use crate::many::function_of;
use crate::values::{Element, Fill, filled, output_shape, with_floats, wrap};

const OP: &str = "qlora-linear";

/// `y = W x + scale * B (A x) + bias` with a frozen NF4 weight `W` `[d_out, d_in]` and variables `A` `[rank, d_in]` and `B`
/// `[d_out, rank]`; with `DoRA`, also a variable `m` `[d_out]`, the magnitude, and `y = m / |V| * V x + bias` for `V = W +
/// scale * B A` and the norms of its rows.
///
/// Outputs and gradients are those of [`QLoRALayer`], bit for bit. Weight and bias get no gradient; nor does an input that
/// no variable leads to. With `DoRA` the norms count as constants in the gradient, as in PEFT; each forward computes them from
/// the values that `A` and `B` have then, `d_out * d_in * rank` multiply-adds in f64, and its backward uses them again. There
/// is no dropout: a model applies it to `x` itself, but then `W` sees it too. See the crate for types and shapes.
#[derive(Clone)]
pub struct QLoRALinear {
    name: String,
    /// On shared bytes: a clone copies none.
    weight: Quantized4Bit,
    bias: Option<Arc<[f32]>>,
    arithmetic: Arithmetic,
    threads: Option<Arc<dyn Threads>>,
    kind: Kind,
    a: Tensor,
    b: Tensor,
    magnitude: Option<Tensor>,
}

impl QLoRALinear {
    /// A layer of a weight, a bias `[d_out]`, and the variables of an adapter, for the module `name` of a model
    /// (`model.layers.0.self_attn.q_proj`).
    ///
    /// In `vars` they have the names of PEFT, `base_model.model.NAME.lora_A.weight`, `lora_B.weight` and, with `DoRA`,
    /// `lora_magnitude_vector`. As everywhere in candle, variables that are there already are used as they are, with their
    /// values; otherwise those of the adapter are the first ones. The magnitude of an adapter that has none yet
    /// ([`LoRAAdapter::with_dora`]) starts as the norms of its rows.
    ///
    /// # Errors
    /// [`nf4::Error::Mismatch`] if weight and adapter differ in `[d_out, d_in]`; [`nf4::Error::Shape`] and
    /// [`nf4::Error::NotFinite`] for the bias; a message for variables of another shape or type than f32. No variable is made
    /// then.
    pub fn new(
        name: &str,
        weight: Quantized4Bit,
        bias: Option<Vec<f32>>,
        adapter: &LoRAAdapter,
        vars: &VarMap,
    ) -> Result<Self> {
        let weight = shared(weight).map_err(wrap)?;
        let layer = QLoRALayer::from_parts(weight, adapter.clone()).map_err(wrap)?;
        let layer = if let Some(bias) = bias { layer.with_bias(bias).map_err(wrap)? } else { layer };
        // Now the adapter has its magnitude.
        let (weight, bias, adapter) = layer.into_parts();
        let kind = Kind::of(&adapter);
        let (a, b, magnitude) = (adapter.a().data(), adapter.b().data(), adapter.magnitude().map(nf4::Tensor::data));
        // Whatever does not fit is an error now.
        kind.adapter(a.to_vec(), b.to_vec(), magnitude.map(<[f32]>::to_vec)).map_err(wrap)?;
        let Kind { d_out, d_in, rank, .. } = kind;
        let parts = [("lora_A.weight", vec![rank, d_in], a), ("lora_B.weight", vec![d_out, rank], b)];
        let magnitude = magnitude.map(|m| ("lora_magnitude_vector", vec![d_out], m));
        let mut variables = variables(vars, name, parts.into_iter().chain(magnitude).collect())?.into_iter();
        let (Some(a), Some(b), magnitude) = (variables.next(), variables.next(), variables.next()) else {
            return Err(Error::Msg(format!("{name}: an adapter has two variables or more")).bt());
        };
        let (name, bias) = (name.to_string(), bias.map(Arc::from));
        Ok(Self { name, weight, bias, arithmetic: Arithmetic::default(), threads: None, kind, a, b, magnitude })
    }

    /// The same layer with another arithmetic of the forward than [`Arithmetic::SixteenByFour`]. Gradients are f32 in any
    /// case; they are those of the f32 forward.
    #[must_use]
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self
    }

    /// The same layer on a pool of threads; without one, it runs on that of `rayon`.
    #[must_use]
    pub fn with_threads(mut self, threads: Arc<dyn Threads>) -> Self {
        self.threads = Some(threads);
        self
    }

    /// The layer of the library with the values that the variables have now, for forwards and backwards on slices. With
    /// `DoRA`, the norms are computed.
    ///
    /// One is made for each forward, so that none has to be locked while the threads of a pool work on it; it copies `rank *
    /// (d_in + d_out)` values, and no weight, because these are shared.
    ///
    /// # Errors
    /// [`nf4::Error::NotFinite`] if one of the values is NaN or infinite.
    pub fn layer(&self) -> Result<QLoRALayer> {
        let layer = QLoRALayer::from_parts(self.weight.clone(), self.adapter()?).map_err(wrap)?;
        let layer = layer.with_arithmetic(self.arithmetic);
        let layer = if let Some(threads) = &self.threads { layer.with_threads(threads.clone()) } else { layer };
        if let Some(bias) = &self.bias { layer.with_bias(bias.to_vec()).map_err(wrap) } else { Ok(layer) }
    }

    /// The adapter with the values that the variables have now.
    ///
    /// # Errors
    /// [`nf4::Error::NotFinite`] if one of them is NaN or infinite.
    pub fn adapter(&self) -> Result<LoRAAdapter> {
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let magnitude = self.magnitude.as_ref().map(values).transpose()?;
        self.kind.adapter(values(&self.a)?, values(&self.b)?, magnitude).map_err(wrap)
    }

    /// As [`Module::forward`], with nothing kept for a backward: for evaluations.
    ///
    /// # Errors
    /// The errors of `forward`.
    pub fn forward_detached(&self, x: &Tensor) -> Result<Tensor> {
        let (y, shape) = outputs(&self.layer()?, x)?;
        function_of((y, shape), &[], |_| Ok(Vec::new()))
    }

    /// The name of the module.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `A`, `[rank, d_in]`: a variable.
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// `B`, `[d_out, rank]`: a variable.
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The magnitude of `DoRA`, `[d_out]`: a variable. `None` without `DoRA`.
    #[must_use]
    pub fn magnitude(&self) -> Option<&Tensor> {
        self.magnitude.as_ref()
    }

    /// The variables: `A`, `B` and, with `DoRA`, the magnitude, in the order of [`QLoRALayer::trainable_params`].
    pub fn variables(&self) -> impl Iterator<Item = &Tensor> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Quantized4Bit {
        &self.weight
    }
}

impl Module for QLoRALinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let layer = self.layer()?;
        let value = outputs(&layer, x)?;
        let input = x.track_op().then_some(x);
        let variables: Vec<Tensor> = self.variables().chain(input).cloned().collect();
        let x = x.clone();
        function_of(value, &variables, move |dy| gradients(layer.clone(), &x, dy))
    }
}

impl fmt::Debug for QLoRALinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kind { d_out, d_in, rank, .. } = self.kind;
        let dora = if self.magnitude.is_some() { ", DoRA" } else { "" };
        write!(f, "QLoRALinear({}: {d_out}, {d_in}, rank {rank}{dora})", self.name)
    }
}

/// What an adapter has besides its values.
#[derive(Debug, Clone, Copy)]
struct Kind {
    d_out: usize,
    d_in: usize,
    rank: usize,
    alpha: f64,
    scaling: LoRAScaling,
}

impl Kind {
    fn of(adapter: &LoRAAdapter) -> Self {
        let (d_out, d_in, rank) = (adapter.d_out(), adapter.d_in(), adapter.rank());
        Self { d_out, d_in, rank, alpha: adapter.alpha(), scaling: adapter.scaling() }
    }

    fn adapter(
        &self,
        a: Vec<f32>,
        b: Vec<f32>,
        magnitude: Option<Vec<f32>>,
    ) -> std::result::Result<LoRAAdapter, nf4::Error> {
        let Self { d_out, d_in, rank, alpha, scaling } = *self;
        let adapter = LoRAAdapter::from_parts(a, b, d_out, d_in, rank, alpha, scaling)?;
        if let Some(magnitude) = magnitude { adapter.with_magnitude(magnitude) } else { Ok(adapter) }
    }
}

/// The variables `base_model.model.NAME.PART` of all parts, with these values if they are new.
fn variables(vars: &VarMap, name: &str, parts: Vec<(&str, Vec<usize>, &[f32])>) -> Result<Vec<Tensor>> {
    let mut map = vars.data().lock().map_err(|_| Error::Msg("the map of variables is poisoned".to_string()))?;
    let full = |part: &str| format!("base_model.model.{name}.{part}");
    for (part, shape, _) in &parts {
        if let Some(var) = map.get(&full(part)).filter(|var| var.dims() != shape || var.dtype() != DType::F32) {
            let (full, dims, dtype) = (full(part), var.dims(), var.dtype());
            return Err(Error::Msg(format!("{full} is {dims:?} in {dtype:?}; expected {shape:?} in F32")).bt());
        }
    }
    let mut tensors = Vec::with_capacity(parts.len());
    for (part, shape, values) in parts {
        let var = match map.entry(full(part)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Var::from_slice(values, shape, &Device::Cpu)?),
        };
        tensors.push(var.as_tensor().clone());
    }
    Ok(tensors)
}

/// The outputs of a layer, in the type of the inputs.
fn outputs(layer: &QLoRALayer, x: &Tensor) -> Result<(CpuStorage, Shape)> {
    let shape = output_shape(OP, x.shape(), [layer.d_out(), layer.d_in()])?;
    let y = with_floats(OP, x, |values| filled(OP, x.dtype(), shape.elem_count(), Forward { layer, x: values }))?;
    Ok((y, shape))
}

/// The gradients of the variables, in their order, and that of the inputs, if a variable leads to them.
fn gradients(mut layer: QLoRALayer, x: &Tensor, dy: &Tensor) -> Result<Vec<Vec<f32>>> {
    let mut dx = x.track_op().then(|| vec![0.0; x.elem_count()]);
    with_floats(OP, x, |x| {
        with_floats(OP, dy, |dy| {
            let mut scratch = nf4::BackwardScratch::new();
            let batch = x.len() / layer.d_in().max(1);
            scratch.reserve(layer.d_out(), layer.d_in(), layer.rank(), batch).map_err(wrap)?;
            layer.backward_into(x, dy, &mut scratch, dx.as_deref_mut()).map_err(wrap)
        })
    })?;
    let gradient = |of: &mut nf4::Tensor| of.grad().map_or_else(|| vec![0.0; of.len()], <[f32]>::to_vec);
    Ok(layer.trainable_params().into_iter().map(gradient).chain(dx).collect())
}

struct Forward<'a> {
    layer: &'a QLoRALayer,
    x: &'a [f32],
}

impl Fill for Forward<'_> {
    fn fill<Y: Element>(self, y: &mut [Y]) -> std::result::Result<(), nf4::Error> {
        let Self { layer, x } = self;
        let batch = x.len() / layer.d_in().max(1);
        let mut scratch = nf4::Scratch::new();
        let block_size = layer.base_weight_quantized().block_size();
        scratch.reserve(layer.d_out(), layer.d_in(), block_size, layer.rank(), batch)?;
        layer.forward_into(x, &mut scratch, y)
    }
}

/// The same weight with bytes that clones share, if it owned them.
fn shared(weight: Quantized4Bit) -> std::result::Result<Quantized4Bit, nf4::Error> {
    struct Floats(Vec<f32>);

    impl AsRef<[u8]> for Floats {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    if weight.memory_bytes() == 0 {
        return Ok(weight);
    }
    let bytes = |bytes: &[u8]| Store::<u8>::shared(Arc::new(bytes.to_vec()), 0..bytes.len());
    let floats = |floats: &[f32]| Store::<f32>::shared(Arc::new(Floats(floats.to_vec())), 0..size_of_val(floats));
    let absmax = match weight.absmax().view() {
        Absmax::Nested(nested) => {
            AbsmaxBuf::nested(bytes(nested.codes())?, floats(nested.absmax())?, nested.quant_map(), nested.offset())?
        }
        Absmax::Plain(absmax) => AbsmaxBuf::plain(floats(absmax)?),
        // No other kind has been invented yet.
        _ => return Ok(weight),
    };
    Quantized4Bit::from_parts(bytes(weight.packed())?, absmax, weight.rows(), weight.cols(), weight.block_size())
}
