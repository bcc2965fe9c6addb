//! Random sequences of operations on a layer: results lie within derived bounds of dense arithmetic in f64, every way to
//! compute one gives the same bits, and what is refused changes nothing.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::checkpoint::{FloatType, Linear4bit, PeftAdapter, TensorFile, to_safetensors};
use nf4::optim::{AdamW, Sgd};
use nf4::{
    Absmax, AbsmaxBuf, Adapters, Arithmetic, BlockSize, Error, Kernels, LoRAAdapter, LoRALayer, LoRAScaling,
    MultiAdapterLayer, QLoRALayer, Quantized4Bit, SharedBytes, Store, Tensor, bf16, f16,
};
use nf4_fuzz::model::{self, with_scale};
use nf4_fuzz::{Bytes, Floats, bits};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    d_out: u8,
    d_in: u16,
    rank: u8,
    block_size: u8,
    /// Double quantization, bias, `DoRA`.
    options: u8,
    /// How values are made, and of what.
    floats: Floats,
    seed: u64,
    operations: &'a [u8],
}

struct State<'a> {
    layer: QLoRALayer,
    sgd: Sgd,
    adamw: AdamW,
    floats: Floats,
    bytes: Bytes<'a>,
    /// Whether every value that went into the layer is of a size for which the bounds hold.
    tame: bool,
}

fuzz_target!(|input: Input<'_>| {
    let seed = input.seed.to_le_bytes();
    let mut bytes = Bytes::new(&seed);
    let (d_out, d_in, rank) =
        (usize::from(input.d_out) % 40, usize::from(input.d_in) % 300, usize::from(input.rank) % 20);
    let block_size = BlockSize::ALL[usize::from(input.block_size) % BlockSize::ALL.len()];
    let weights = input.floats.take(d_out * d_in, &mut bytes);
    let [a, b] = [rank * d_in, d_out * rank]
        .map(|len| Floats { patches: [(u16::MAX, 0); 2], ..input.floats }.take(len, &mut bytes));
    let Ok(base) = Quantized4Bit::quantize(&weights, d_out, d_in, block_size, input.options & 1 != 0) else {
        assert!(weights.iter().any(|w| !w.is_finite() || w.abs() > 1e30), "refused finite weights");
        return;
    };
    let mut tame = [&weights, &a, &b].iter().all(|values| model::is_tame(values));
    let adapter = LoRAAdapter::from_parts(a, b, d_out, d_in, rank, 4.0, LoRAScaling::Standard);
    let adapter = match adapter {
        Err(Error::RankZero) => return assert_eq!(rank, 0),
        Err(error) => return assert!(matches!(error, Error::NotFinite { .. }) && !tame, "{error}"),
        Ok(adapter) => {
            if input.options & 4 != 0 {
                adapter.with_dora()
            } else {
                adapter
            }
        }
    };
    let mut layer = joined(base, adapter);
    if input.options & 2 != 0 {
        let bias = vec![0.5; d_out];
        layer = layer.with_bias(bias).expect("finite, and it fits");
    }
    tame &= layer.adapter().magnitude().is_none_or(|m| model::is_tame(m.data()));
    let mut state = State { layer, sgd: Sgd::new(0.125), adamw: AdamW::new(0.01), floats: input.floats, bytes, tame };
    for operation in input.operations.iter().take(16) {
        state.run(operation % 16, usize::from(operation / 16));
    }
    state.forward();
});

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
        let floats = Floats { patches: [(u16::MAX, 0); 2], ..self.floats };
        floats.take(len, &mut self.bytes)
    }

    fn vector(&mut self, len: usize) -> Tensor {
        Tensor::from_vec(self.inputs(len), false)
    }

    /// Whether the bounds hold for these inputs.
    fn is_tame(&self, x: &[f32]) -> bool {
        self.tame && model::is_tame(x)
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

    fn forward(&mut self) {
        let x = self.vector(self.layer.d_in());
        let y = self.layer.forward(&x);
        for k in Kernels::available() {
            let other = self.layer.clone().with_kernels(k).forward(&x);
            assert_eq!(bits(other.data()), bits(y.data()), "{} and {}", k.isa(), self.layer.kernels().isa());
        }
        if self.is_tame(x.data()) {
            model::check_forward(&self.layer, &self.plain(), x.data(), y.data());
        }
    }

    fn batch(&mut self, batch: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        let x = self.vector(batch * d_in);
        let y = self.layer.forward(&x);
        if d_in == 0 {
            return assert_eq!(y.len(), d_out);
        }
        for (x, y) in x.data().chunks(d_in).zip(y.data().chunks(d_out.max(1))) {
            let alone = self.layer.forward(&Tensor::from_vec(x.to_vec(), false));
            assert_eq!(bits(alone.data()), bits(y), "a vector of a batch of {batch}, and alone");
        }
        // In other types: inputs are converted first, outputs last.
        let halves: Vec<f16> = x.data().iter().map(|x| nf4::Float::from_f32(*x)).collect();
        let mut rounded = vec![bf16::ZERO; batch * d_out];
        let mut scratch = self.layer.scratch(batch);
        self.layer.forward_into(&halves, &mut scratch, &mut rounded).expect("the lengths fit");
        let exact = halves.iter().map(|x| nf4::Float::to_f32(*x)).collect();
        let y = self.layer.forward(&Tensor::from_vec(exact, false));
        let expected: Vec<bf16> = y.data().iter().map(|y| nf4::Float::from_f32(*y)).collect();
        assert_eq!(bits(&rounded), bits(&expected));
    }

    fn backward(&mut self, batch: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        // Without inputs, or without outputs, the other has to say how many vectors there are.
        let batch = if d_in == 0 { 0 } else { batch };
        let (x, dy) = (self.vector(batch * d_in), self.vector(batch * d_out));
        let before = self.layer.clone();
        let dx = self.layer.backward(&x, &dy);
        for k in Kernels::available() {
            let mut other = before.clone().with_kernels(k);
            assert_eq!(bits(other.backward(&x, &dy).data()), bits(dx.data()), "{}", k.isa());
            for (p, q) in other.trainable_params().iter().zip(self.layer.clone().trainable_params()) {
                assert_eq!(p.grad().map(bits), q.grad().map(bits), "gradients, {}", k.isa());
            }
        }
        let gradients = [self.layer.lora_a(), self.layer.lora_b()].map(|t| t.grad().unwrap_or_default());
        if self.is_tame(x.data()) && model::is_tame(dy.data()) && d_in * d_out > 0 {
            model::check_gradients(&before, x.data(), dy.data(), [gradients[0], gradients[1], dx.data()]);
        }
        self.tame &= gradients.iter().all(|g| model::is_tame(g));
    }

    /// After a change of the adapter: with `DoRA` a forward is refused until the norms are taken again.
    fn changed(&mut self) {
        let zeros = Tensor::zeros(self.layer.d_in(), false);
        match self.layer.try_forward(&zeros) {
            Err(error) => assert!(error == Error::StaleNorms && self.layer.adapter().is_dora(), "{error}"),
            // Without inputs and outputs every batch is an empty one, which needs no norms.
            Ok(y) => assert!(!self.layer.adapter().is_dora() || y.is_empty(), "stale norms were used"),
        }
        self.layer.refresh_dora().expect("the lengths fit");
        let params = self.layer.clone();
        let magnitude = params.adapter().magnitude().map(Tensor::data).unwrap_or_default();
        self.tame &= [params.lora_a().data(), params.lora_b().data(), magnitude].iter().all(|v| model::is_tame(v));
    }

    fn sgd(&mut self) {
        let before = self.layer.clone();
        let result = self.sgd.step(self.layer.trainable_params());
        self.stepped(&before, result, |before, grad, _, after| model::check_sgd(before, grad, 0.125, after));
    }

    fn adamw(&mut self) {
        let (before, old) = (self.layer.clone(), self.adamw.state.clone());
        let result = self.adamw.step(self.layer.trainable_params());
        let new = self.adamw.state.clone();
        if old.len() != new.len() {
            return self.stepped(&before, result, |_, _, _, _| ());
        }
        self.stepped(&before, result, |before, grad, i, after| {
            model::check_adamw(before, grad, 0.01, [&old[i], &new[i]], after);
        });
    }

    /// A step of an optimizer; `check` gets values, gradient and number of a tensor that was changed, and its new values.
    fn stepped(&mut self, old: &QLoRALayer, result: Result<(), Error>, check: impl Fn(&[f32], &[f32], usize, &[f32])) {
        let mut old = old.clone();
        let old = old.trainable_params();
        let mut new = self.layer.clone();
        match result {
            Ok(()) => {
                for (i, (old, new)) in old.iter().zip(new.trainable_params()).enumerate() {
                    match old.grad().filter(|_| self.tame) {
                        Some(grad) => check(old.data(), grad, i, new.data()),
                        None => assert!(old.grad().is_some() || bits(old.data()) == bits(new.data())),
                    }
                }
            }
            Err(error) => {
                // The state of an optimizer is for the tensors that it was made for: with or without a magnitude.
                let other_tensors = matches!(error, Error::Shape(_)) && !self.adamw.state.is_empty();
                assert!(other_tensors || matches!(error, Error::NotFinite { .. }) && !self.tame, "{error}");
                assert!(old.iter().zip(new.trainable_params()).all(|(old, new)| bits(old.data()) == bits(new.data())));
            }
        }
        self.changed();
    }

    /// Another value in `A` or `B`; sometimes not a finite one.
    fn change(&mut self, argument: usize) {
        let value = match argument {
            15 => f32::NAN,
            14 => f32::NEG_INFINITY,
            13 => 1e38,
            _ => self.inputs(1)[0],
        };
        let place = usize::from(self.bytes.byte());
        let tensor = if argument.is_multiple_of(2) { self.layer.lora_a_mut() } else { self.layer.lora_b_mut() };
        let len = tensor.len().max(1);
        if let Some(v) = tensor.data_mut().get_mut(place % len) {
            *v = value;
        }
        self.changed();
    }

    fn merge(&mut self) {
        let merged = self.layer.merge_to_f32();
        if self.tame {
            model::check_merged(&self.layer, &merged);
        }
        let (d_out, d_in) = (self.layer.d_out(), self.layer.d_in());
        let start = usize::from(self.bytes.byte()) % (d_out + 1);
        let mut rows = vec![f16::ZERO; (d_out - start) * d_in];
        self.layer.merge_rows_into(start..d_out, &mut rows).expect("inside");
        let expected: Vec<f16> = merged[start * d_in..].iter().map(|m| nf4::Float::from_f32(*m)).collect();
        assert_eq!(bits(&rows), bits(&expected), "rows from {start} on");
    }

    fn requantize(&mut self, argument: usize) {
        let (block_size, double_quant) = (BlockSize::ALL[argument % 8], argument / 8 == 1);
        let merged = self.layer.merge_to_f32();
        let (d_out, d_in) = (self.layer.d_out(), self.layer.d_in());
        let expected = Quantized4Bit::quantize(&merged, d_out, d_in, block_size, double_quant);
        match (self.layer.merge_requantized(block_size, double_quant), expected) {
            (Ok((got, error)), Ok(expected)) => {
                assert_eq!(got.packed(), expected.packed());
                assert_eq!(bits(&got.dequantize::<f32>()), bits(&expected.dequantize::<f32>()));
                let pairs = got.dequantize::<f32>().into_iter().zip(merged);
                let largest = pairs.map(|(q, m)| (f64::from(q) - f64::from(m)).abs()).fold(0.0, f64::max);
                assert_eq!(error.max_abs_error.to_bits(), largest.to_bits());
            }
            (Err(got), Err(expected)) => assert_eq!(std::mem::discriminant(&got), std::mem::discriminant(&expected)),
            (got, expected) => panic!("requantized {:?}, quantized {:?}", got.err(), expected.err()),
        }
    }

    /// Base and adapter through files, which keep every bit.
    fn save(&mut self) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let mut base = Linear4bit::new(base, FloatType::F32);
        if let Some(bias) = bias {
            base = base.with_bias(bias, FloatType::F32).expect("it was checked before");
        }
        let base = to_safetensors(&base.tensors("m")).expect("a layer can be written");
        let base = Linear4bit::load(&TensorFile::parse(&base).expect("just written"), "m").expect("just written");
        let finite = [adapter.a(), adapter.b()]
            .into_iter()
            .chain(adapter.magnitude())
            .all(|t| t.data().iter().all(|v| v.is_finite()));
        let (config, file) = PeftAdapter::new([("m".to_owned(), adapter)])
            .and_then(|adapter| adapter.to_files(FloatType::F32))
            .expect("an adapter can be written");
        let adapter = PeftAdapter::load(config.as_bytes(), &TensorFile::parse(&file).expect("just written"));
        assert_eq!(adapter.is_ok(), finite, "{:?}", adapter.err());
        let Ok(adapter) = adapter else { return };
        let loaded = adapter.layer("m", base).expect("it fitted").with_arithmetic(self.layer.arithmetic());
        let x = self.vector(loaded.d_in());
        assert_eq!(bits(loaded.forward(&x).data()), bits(self.layer.forward(&x).data()), "loaded, and before");
        assert_eq!(bits(&loaded.merge_to_f32()), bits(&self.layer.merge_to_f32()));
    }

    fn switch(&mut self, argument: usize) {
        let kernels: Vec<Kernels> = Kernels::available().collect();
        let arithmetic = if argument.is_multiple_of(2) { Arithmetic::F32 } else { Arithmetic::SixteenByFour };
        let layer = self.layer.clone().with_arithmetic(arithmetic).with_kernels(kernels[argument / 2 % kernels.len()]);
        self.layer = layer;
    }

    /// The same adapter, and others, on a layer of many.
    fn multi(&mut self, argument: usize) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let mut multi = MultiAdapterLayer::new(base).with_arithmetic(self.layer.arithmetic());
        if let Some(bias) = bias {
            multi = multi.with_bias(bias).expect("it was checked before");
        }
        let x = self.vector(multi.d_in());
        let without = multi.forward(&x, Adapters::Active);
        let b = multi.add("b", adapter.clone()).expect("it fitted");
        multi.add("a", with_scale_or(&adapter, -2.0)).expect("it fitted");
        assert!(matches!(multi.add("a", adapter), Err(Error::DuplicateAdapter { .. })));
        multi.set_active(&["b"]).expect("it is there");
        let alone = self.layer.forward(&x);
        assert_eq!(
            bits(multi.forward(&x, Adapters::Active).data()),
            bits(alone.data()),
            "one adapter of many, and alone"
        );

        multi.set_active(&["a", "b"]).expect("both are there");
        assert!(multi.set_active(&["b", "c"]).is_err());
        let both = multi.forward(&x, Adapters::Active);
        multi.set_weight("a", argument as f32 - 8.0).expect("finite");
        assert_eq!(multi.names().collect::<Vec<_>>(), multi.active().collect::<Vec<_>>());
        if self.layer.d_in() > 0 {
            let batch = Tensor::from_vec(x.data().repeat(3), false);
            let y = multi.forward(&batch, Adapters::PerVector(&[Some(b), None, Some(b)]));
            let expected = [alone.data(), without.data(), alone.data()].concat();
            assert_eq!(bits(y.data()), bits(&expected), "an adapter for each vector");
        }
        multi.set_weight("a", 1.0).expect("finite");
        multi.rename("a", "z").expect("it is there");
        multi.rename("b", "a").expect("it is there");
        multi.remove("z").expect("it is there");
        assert_eq!(bits(multi.forward(&x, Adapters::Active).data()), bits(alone.data()), "after the others are gone");
        drop(both);
    }

    /// The layer on a dense base of the same weight.
    fn dense(&mut self) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let finite = [adapter.a(), adapter.b()].iter().all(|t| t.data().iter().all(|v| v.is_finite()));
        let weights = Tensor::from_vec(base.dequantize::<f32>(), false);
        let mut dense = LoRALayer::from_parts(weights, adapter).expect("it fitted");
        if let Some(bias) = bias {
            dense = dense.with_bias(bias).expect("it was checked before");
        }
        let x = self.vector(dense.d_in());
        let (y, weight) = (dense.forward(&x), bits(dense.base_weight().data()));
        dense.merge();
        assert_eq!(bits(dense.base_weight().data()), bits(&self.layer.merge_to_f32()), "merged");
        let _ = dense.forward(&x);
        dense.unmerge();
        assert_eq!(bits(dense.base_weight().data()), weight);
        assert_eq!(bits(dense.forward(&x).data()), bits(y.data()));
        if finite {
            // Quantized again, the weights are those of the base, or not: what is the same is the adapter.
            let again = QLoRALayer::try_from_lora(dense);
            assert!(again.is_ok_and(|layer| bits(layer.lora_a().data()) == bits(self.layer.lora_a().data())));
        }
    }

    /// Lengths that do not fit.
    fn refused(&mut self) {
        let (d_in, d_out, before) = (self.layer.d_in(), self.layer.d_out(), self.bits());
        let long = Tensor::zeros(d_in + 1, false);
        assert!(d_in == 1 || self.layer.try_forward(&long).is_err());
        assert!(self.layer.try_backward(&long, &Tensor::zeros(d_out, false)).is_err() || d_in == 1 && d_out == 0);
        assert!(self.layer.merge_rows_into(0..d_out + 1, &mut vec![0.0_f32; (d_out + 1) * d_in]).is_err());
        let mut scratch = nf4::Scratch::new();
        let result = self.layer.forward_into(&vec![0.0; d_in], &mut scratch, &mut vec![0.0; d_out]);
        assert!(result.is_err() || d_out == 0 || self.layer.d_in() == 0, "no scratch");
        assert_eq!(self.bits(), before, "what is refused changes nothing");
    }

    /// Tensors of the adapter that were replaced by others of another length: an error, whatever uses them.
    fn replaced(&mut self, argument: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        let mut layer = self.layer.clone();
        let tensor = match argument % 3 {
            0 => layer.lora_a_mut(),
            1 => layer.lora_b_mut(),
            _ => match layer.adapter_mut().magnitude_mut() {
                Some(magnitude) => magnitude,
                None => return,
            },
        };
        let len = usize::from(self.bytes.byte());
        if tensor.len() == len || d_in + d_out == 0 {
            return;
        }
        *tensor = Tensor::zeros(len, true);
        let (x, dy) = (Tensor::zeros(d_in, false), Tensor::zeros(d_out, false));
        assert!(layer.try_forward(&x).is_err(), "forward");
        assert!(layer.try_backward(&x, &dy).is_err(), "backward");
        assert!(layer.refresh_dora().is_err(), "norms");
        assert!(layer.merge_rows_into(0..d_out, &mut vec![0.0_f32; d_out * d_in]).is_err(), "merge");
        assert!(layer.merge_requantized(BlockSize::B64, false).is_err(), "requantize");
        let (base, _, adapter) = layer.into_parts();
        let weight = base.dequantize();
        assert!(QLoRALayer::from_parts(base.clone(), adapter.clone()).is_err(), "a layer");
        assert!(LoRALayer::from_parts(Tensor::from_vec(weight, false), adapter.clone()).is_err(), "a dense layer");
        assert!(MultiAdapterLayer::new(base.clone()).add("a", adapter.clone()).is_err(), "one of many");
        let peft = PeftAdapter::new([("m".to_owned(), adapter)]);
        assert!(peft.is_err() || peft.is_ok_and(|p| p.to_files(FloatType::F32).is_err()), "files");
    }

    /// The base on bytes that it shares, at any alignment.
    fn share(&mut self, argument: usize) {
        let base = self.layer.base_weight_quantized();
        let Absmax::Plain(absmax) = base.absmax().view() else { return };
        let absmax: Vec<u8> = absmax.iter().flat_map(|a| a.to_le_bytes()).collect();
        let start = argument % 4;
        let ends = [start + base.packed().len(), start + base.packed().len() + absmax.len()];
        let file: SharedBytes = Arc::new([&vec![0; start], base.packed(), &absmax].concat());
        let packed = Store::<u8>::shared(file.clone(), start..ends[0]).expect("inside");
        let absmax = AbsmaxBuf::plain(Store::<f32>::shared(file, ends[0]..ends[1]).expect("inside"));
        let shared = Quantized4Bit::from_parts(packed, absmax, base.rows(), base.cols(), base.block_size());
        let shared = shared.expect("the parts of a weight");
        assert_eq!(bits(&shared.dequantize::<f32>()), bits(&base.dequantize::<f32>()));
        let layer = joined(shared, self.layer.adapter().clone()).with_arithmetic(self.layer.arithmetic());
        self.layer = match self.layer.bias() {
            Some(bias) => layer.with_bias(bias.to_vec()).expect("it was checked before"),
            None => layer,
        };
    }

    /// Another alpha and scaling, with `DoRA` or without.
    fn rescale(&mut self, argument: usize) {
        let finite = [self.layer.lora_a(), self.layer.lora_b()].iter().all(|t| t.data().iter().all(|v| v.is_finite()));
        if !finite {
            return;
        }
        let scaling = if argument.is_multiple_of(2) { LoRAScaling::Standard } else { LoRAScaling::RsLoRA };
        let adapter = with_scale(self.layer.adapter(), argument as f64 - 5.0, scaling);
        let adapter = if (argument / 2).is_multiple_of(2) { adapter } else { adapter.with_dora() };
        let (arithmetic, (base, bias, _)) = (self.layer.arithmetic(), self.layer.clone().into_parts());
        let layer = joined(base, adapter).with_arithmetic(arithmetic);
        self.layer = match bias {
            Some(bias) => layer.with_bias(bias).expect("it was checked before"),
            None => layer,
        };
        self.tame &= self.layer.adapter().magnitude().is_none_or(|m| model::is_tame(m.data()));
    }
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
