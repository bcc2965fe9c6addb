//! A frozen 4-bit weight with a trained adapter.

use std::fmt;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Tensor, Var};
use candle_nn::{Module, VarMap};
use nf4::{Absmax, AbsmaxBuf, Arithmetic, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Store, Threads};

use crate::values::{Element, Fill, filled, floats, output_shape, with_floats, wrap};

const OP: &str = "qlora-linear";

/// `y = W x + scale * B (A x) + bias` with a frozen NF4 weight `W` `[d_out, d_in]` and variables `A` `[rank, d_in]` and `B`
/// `[d_out, rank]`.
///
/// Outputs and gradients are those of [`QLoRALayer`], bit for bit. Weight and bias get no gradient; nor does an input that
/// no variable leads to. There is no dropout: a model applies it to `x` itself, but then `W` sees it too. `DoRA` is refused.
/// See the crate for types and shapes.
#[derive(Clone)]
pub struct QLoRALinear {
    name: String,
    op: Op,
    a: Tensor,
    b: Tensor,
}

impl QLoRALinear {
    /// A layer of a weight, a bias `[d_out]`, and the variables of an adapter, for the module `name` of a model
    /// (`model.layers.0.self_attn.q_proj`).
    ///
    /// In `vars` they have the names of PEFT, `base_model.model.NAME.lora_A.weight` and `lora_B.weight`. As everywhere in
    /// candle, variables that are there already are used as they are, with their values; otherwise those of the adapter are
    /// the first ones.
    ///
    /// # Errors
    /// [`nf4::Error::Mismatch`] if weight and adapter differ in `[d_out, d_in]`; [`nf4::Error::Shape`] and
    /// [`nf4::Error::NotFinite`] for the bias; a message for an adapter with `DoRA`, and for variables of another shape or
    /// type than f32.
    pub fn new(
        name: &str,
        weight: Quantized4Bit,
        bias: Option<Vec<f32>>,
        adapter: &LoRAAdapter,
        vars: &VarMap,
    ) -> Result<Self> {
        if adapter.is_dora() {
            return Err(Error::Msg(format!("{name}: adapters with DoRA are not supported in candle")).bt());
        }
        let (base, got) = ([weight.rows(), weight.cols()], [adapter.d_out(), adapter.d_in()]);
        if base != got {
            return Err(wrap(nf4::Error::Mismatch { base, adapter: got }));
        }
        let op = Op {
            weight: shared(weight).map_err(wrap)?,
            bias: bias.map(Arc::new),
            arithmetic: Arithmetic::default(),
            rank: adapter.rank(),
            alpha: adapter.alpha(),
            scaling: adapter.scaling(),
            threads: None,
        };
        // Whatever does not fit is an error now.
        op.layer(adapter.a().data(), adapter.b().data()).map_err(wrap)?;
        let [d_out, d_in] = op.shape();
        let a = variable(vars, name, "lora_A", (op.rank, d_in), adapter.a().data())?;
        let b = variable(vars, name, "lora_B", (d_out, op.rank), adapter.b().data())?;
        Ok(Self { name: name.to_string(), op, a, b })
    }

    /// The same layer with another arithmetic of the forward than [`Arithmetic::SixteenByFour`]. Gradients are f32 in any
    /// case; they are those of the f32 forward.
    #[must_use]
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.op.arithmetic = arithmetic;
        self
    }

    /// The same layer on a pool of threads; without one, it runs on that of `rayon`.
    #[must_use]
    pub fn with_threads(mut self, threads: Arc<dyn Threads>) -> Self {
        self.op.threads = Some(threads);
        self
    }

    /// The layer of the library with the values that the variables have now, for forwards and backwards on slices.
    ///
    /// # Errors
    /// [`nf4::Error::NotFinite`] if one of the values is NaN or infinite.
    pub fn layer(&self) -> Result<QLoRALayer> {
        with_floats(OP, &self.a, |a| with_floats(OP, &self.b, |b| self.op.layer(a, b).map_err(wrap)))
    }

    /// The adapter with the values that the variables have now.
    ///
    /// # Errors
    /// [`nf4::Error::NotFinite`] if one of them is NaN or infinite.
    pub fn adapter(&self) -> Result<LoRAAdapter> {
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        self.op.adapter(values(&self.a)?, values(&self.b)?).map_err(wrap)
    }

    /// As [`Module::forward`], with nothing kept for a backward: for evaluations.
    ///
    /// # Errors
    /// The errors of `forward`.
    pub fn forward_detached(&self, x: &Tensor) -> Result<Tensor> {
        x.detach().contiguous()?.apply_op3_no_bwd(&self.a, &self.b, &self.op)
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

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Quantized4Bit {
        &self.op.weight
    }
}

/// The variable `base_model.model.NAME.PART.weight`, with these values if it is new.
fn variable(vars: &VarMap, name: &str, part: &str, shape: (usize, usize), values: &[f32]) -> Result<Tensor> {
    let full = format!("base_model.model.{name}.{part}.weight");
    let mut map = vars.data().lock().map_err(|_| Error::Msg("the map of variables is poisoned".to_string()))?;
    if let Some(var) = map.get(&full) {
        if var.dims() != [shape.0, shape.1] || var.dtype() != DType::F32 {
            let (dims, dtype) = (var.dims(), var.dtype());
            let msg = format!("{full} is {dims:?} in {dtype:?}; expected [{}, {}] in F32", shape.0, shape.1);
            return Err(Error::Msg(msg).bt());
        }
        return Ok(var.as_tensor().clone());
    }
    let var = Var::from_slice(values, shape, &Device::Cpu)?;
    let tensor = var.as_tensor().clone();
    map.insert(full, var);
    Ok(tensor)
}

impl Module for QLoRALinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op3(&self.a, &self.b, self.op.clone())
    }
}

impl fmt::Debug for QLoRALinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [d_out, d_in] = self.op.shape();
        write!(f, "QLoRALinear({}: {d_out}, {d_in}, rank {})", self.name, self.op.rank)
    }
}

/// What stays the same from step to step.
#[derive(Clone)]
struct Op {
    /// On shared bytes: a clone copies none.
    weight: Quantized4Bit,
    bias: Option<Arc<Vec<f32>>>,
    arithmetic: Arithmetic,
    rank: usize,
    alpha: f64,
    scaling: LoRAScaling,
    threads: Option<Arc<dyn Threads>>,
}

impl Op {
    fn shape(&self) -> [usize; 2] {
        [self.weight.rows(), self.weight.cols()]
    }

    fn adapter(&self, a: Vec<f32>, b: Vec<f32>) -> std::result::Result<LoRAAdapter, nf4::Error> {
        let [d_out, d_in] = self.shape();
        LoRAAdapter::from_parts(a, b, d_out, d_in, self.rank, self.alpha, self.scaling)
    }

    /// The layer that these values of `A` and `B` make. One is made for each call, so that none has to be locked while the
    /// threads of a pool work on it; it copies `rank * (d_in + d_out)` values, and no weight, because these are shared.
    fn layer(&self, a: &[f32], b: &[f32]) -> std::result::Result<QLoRALayer, nf4::Error> {
        let adapter = self.adapter(a.to_vec(), b.to_vec())?;
        let layer = QLoRALayer::from_parts(self.weight.clone(), adapter)?;
        let layer = layer.with_arithmetic(self.arithmetic);
        let layer = if let Some(threads) = &self.threads { layer.with_threads(threads.clone()) } else { layer };
        if let Some(bias) = &self.bias { layer.with_bias(bias.to_vec()) } else { Ok(layer) }
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = output_shape(OP, x_layout.shape(), self.shape())?;
        let layer = self.layer(&floats(OP, a, a_layout)?, &floats(OP, b, b_layout)?).map_err(wrap)?;
        let forward = Forward { layer: &layer, x: &floats(OP, x, x_layout)? };
        Ok((filled(OP, x.dtype(), shape.elem_count(), forward)?, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut layer = with_floats(OP, a, |a| with_floats(OP, b, |b| self.layer(a, b).map_err(wrap)))?;
        let mut dx = x.track_op().then(|| vec![0.0; x.elem_count()]);
        with_floats(OP, x, |x| {
            with_floats(OP, dy, |dy| {
                let mut scratch = nf4::BackwardScratch::new();
                let batch = x.len() / layer.d_in().max(1);
                scratch.reserve(layer.d_out(), layer.d_in(), layer.rank(), batch).map_err(wrap)?;
                layer.backward_into(x, dy, &mut scratch, dx.as_deref_mut()).map_err(wrap)
            })
        })?;
        let gradient = |of: &Tensor, tensor: &nf4::Tensor| match tensor.grad() {
            Some(grad) => Tensor::from_slice(grad, of.shape(), of.device()),
            None => of.zeros_like(),
        };
        let dx = match dx {
            Some(dx) => Some(Tensor::from_vec(dx, x.shape(), x.device())?.to_dtype(x.dtype())?),
            None => None,
        };
        Ok((dx, Some(gradient(a, layer.lora_a())?), Some(gradient(b, layer.lora_b())?)))
    }
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
