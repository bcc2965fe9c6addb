//! A layer, and operations on it that are checked.

mod forward;
mod refused;
mod training;
mod truth;
mod weights;

use arbitrary::Arbitrary;
use nf4::optim::{AdamW, Sgd};
use nf4::{Arithmetic, BlockSize, Error, Kernels, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor};
use truth::with_scale;

use crate::{Bytes, Floats, bits};

/// A layer on its way through the operations.
#[derive(Debug)]
pub struct State<'a> {
    layer: QLoRALayer,
    sgd: Sgd,
    adamw: AdamW,
    floats: Floats,
    bytes: Bytes<'a>,
    /// Whether every value that went into the layer is of a size for which the bounds hold.
    tame: bool,
}

/// What a layer is made of at first.
#[derive(Debug, Arbitrary)]
pub struct Start {
    d_out: u8,
    d_in: u16,
    rank: u8,
    block_size: u8,
    /// Double quantization, bias, `DoRA`.
    options: u8,
    /// How values are made, and of what.
    floats: Floats,
    seed: [u8; 8],
}

impl<'a> State<'a> {
    /// `None` if the layer is rightly refused.
    ///
    /// # Panics
    /// If it is not.
    pub fn new(start: &'a Start) -> Option<Self> {
        let floats = start.floats;
        let mut bytes = Bytes::new(&start.seed);
        let (d_out, d_in, rank) =
            (usize::from(start.d_out) % 40, usize::from(start.d_in) % 300, usize::from(start.rank) % 20);
        let block_size = BlockSize::ALL[usize::from(start.block_size) % BlockSize::ALL.len()];
        let weights = floats.take(d_out * d_in, &mut bytes);
        let [a, b] = [rank * d_in, d_out * rank].map(|len| without_patches(floats).take(len, &mut bytes));
        let Ok(base) = Quantized4Bit::quantize(&weights, d_out, d_in, block_size, start.options & 1 != 0) else {
            assert!(weights.iter().any(|w| !w.is_finite() || w.abs() > 1e30), "refused finite weights");
            return None;
        };
        let tame = [&weights, &a, &b].iter().all(|values| truth::is_tame(values));
        let adapter = match LoRAAdapter::from_parts(a, b, d_out, d_in, rank, 4.0, LoRAScaling::Standard) {
            Ok(adapter) => adapter,
            Err(error) => {
                let wrong_values = matches!(error, Error::NotFinite { .. }) && !tame;
                assert!(wrong_values || matches!(error, Error::RankZero) && rank == 0, "{error}");
                return None;
            }
        };
        let mut layer = joined(base, if start.options & 4 != 0 { adapter.with_dora() } else { adapter });
        if start.options & 2 != 0 {
            layer = layer.with_bias(vec![0.5; d_out]).expect("finite, and it fits");
        }
        let mut state = Self { layer, sgd: Sgd::new(0.125), adamw: AdamW::new(0.01), floats, bytes, tame };
        state.tame &= state.has_tame_magnitude();
        Some(state)
    }

    /// An operation, and what it is done with, from one byte.
    pub fn step(&mut self, operation: u8) {
        self.run(operation % 16, usize::from(operation / 16));
    }
}

impl State<'_> {
    fn run(&mut self, operation: u8, argument: usize) {
        match operation {
            0 => self.forward(),
            1 => self.batch(argument % 6),
            2 | 3 => self.backward(argument % 6),
            4 => self.layer.zero_grad(),
            5 => self.sgd(),
            6 => self.adamw(),
            7 => self.change(argument),
            8 => self.merge(),
            9 => self.requantize(argument),
            10 => self.save(),
            11 => self.switch(argument),
            12 => self.multi(argument),
            13 => self.dense(),
            14 if argument.is_multiple_of(2) => self.refused(),
            14 => self.replaced(argument / 2),
            15 if argument < 4 => self.share(argument),
            _ => self.rescale(argument),
        }
    }

    fn inputs(&mut self, len: usize) -> Vec<f32> {
        without_patches(self.floats).take(len, &mut self.bytes)
    }

    fn vector(&mut self, len: usize) -> Tensor {
        Tensor::from_vec(self.inputs(len), false)
    }

    /// Whether the bounds hold for these inputs.
    fn is_tame(&self, x: &[f32]) -> bool {
        self.tame && truth::is_tame(x)
    }

    fn has_tame_magnitude(&self) -> bool {
        self.layer.adapter().magnitude().is_none_or(|m| truth::is_tame(m.data()))
    }

    /// Parts of the layer as bits, for what must change nothing.
    fn bits(&self) -> [Vec<u32>; 4] {
        let (a, b) = (self.layer.lora_a(), self.layer.lora_b());
        [bits(a.data()), bits(b.data()), bits(a.grad().unwrap_or_default()), bits(b.grad().unwrap_or_default())]
    }

    /// The layer without `DoRA` and bias, and with an adapter that adds nothing.
    fn plain(&self) -> QLoRALayer {
        let nothing = with_scale(self.layer.adapter(), 0.0, LoRAScaling::Standard);
        let layer = QLoRALayer::from_parts(self.layer.base_weight_quantized().clone(), nothing);
        layer.expect("it fitted").with_arithmetic(self.layer.arithmetic())
    }

    fn switch(&mut self, argument: usize) {
        let kernels: Vec<Kernels> = Kernels::available().collect();
        let arithmetic = Arithmetic::ALL[argument % Arithmetic::ALL.len()];
        let kernels = kernels[argument / Arithmetic::ALL.len() % kernels.len()];
        let layer = self.layer.clone().with_arithmetic(arithmetic).with_kernels(kernels);
        self.layer = layer;
    }
}

/// Floats of the same kind, all of the bytes.
fn without_patches(floats: Floats) -> Floats {
    Floats { patches: [(u16::MAX, 0); 2], ..floats }
}

/// A layer of parts that fit.
fn joined(base: Quantized4Bit, adapter: LoRAAdapter) -> QLoRALayer {
    QLoRALayer::from_parts(base, adapter).expect("the shapes fit")
}

/// The adapter with another alpha, or as it is if its values are not finite.
fn with_scale_or(adapter: &LoRAAdapter, alpha: f64) -> LoRAAdapter {
    let finite = [adapter.a(), adapter.b()].iter().all(|t| t.data().iter().all(|v| v.is_finite()));
    if finite { with_scale(adapter, alpha, LoRAScaling::Standard) } else { adapter.clone() }
}
