//! Forward and autograd of both layers, against the layers of `nf4` and finite differences.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarMap};
use half::{bf16, f16};
use nf4::{Arithmetic, BlockSize, Float, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Threads};
use nf4_candle::{Nf4Linear, QLoRALinear};
use rayon::prelude::*;

const D_OUT: usize = 48;
const D_IN: usize = 128;
const RANK: usize = 4;
const NAME: &str = "model.layers.0.self_attn.q_proj";

/// Values in -0.5..0.5 that differ from seed to seed.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

fn weight(double_quant: bool) -> Quantized4Bit {
    Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, BlockSize::B64, double_quant).unwrap()
}

/// With values in `B` too, so that no gradient is zero.
fn adapter() -> LoRAAdapter {
    let (a, b) = (values(RANK * D_IN, 2), values(D_OUT * RANK, 3));
    LoRAAdapter::from_parts(a, b, D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard).unwrap()
}

/// The same pair with a magnitude near the norms of the rows, so that gains are about 1.
fn dora() -> LoRAAdapter {
    adapter().with_magnitude(norms(&adapter()).iter().zip(values(D_OUT, 10)).map(|(n, v)| n + v).collect()).unwrap()
}

/// The norms of the rows of `W + scale * B A`, which are the magnitude that an adapter takes if it has none.
fn norms(adapter: &LoRAAdapter) -> Vec<f32> {
    let layer = QLoRALayer::from_parts(weight(true), adapter.clone().with_dora()).unwrap();
    layer.adapter().magnitude().unwrap().data().to_vec()
}

fn bias() -> Vec<f32> {
    values(D_OUT, 4)
}

/// A layer of `nf4` and its counterpart in candle.
fn both(arithmetic: Arithmetic, adapter: &LoRAAdapter) -> (QLoRALayer, QLoRALinear, VarMap) {
    let vars = VarMap::new();
    let linear = QLoRALinear::new(NAME, weight(true), Some(bias()), adapter, &vars).unwrap();
    let layer = QLoRALayer::from_parts(weight(true), adapter.clone()).unwrap().with_bias(bias()).unwrap();
    (layer.with_arithmetic(arithmetic), linear.with_arithmetic(arithmetic), vars)
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// A pool of two threads that counts what it splits.
#[derive(Default)]
struct Counting(AtomicUsize);

impl Threads for Counting {
    fn count(&self) -> usize {
        2
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        self.0.fetch_add(1, Ordering::Relaxed);
        rayon::join(a, b);
    }

    fn least_work(&self) -> usize {
        1
    }
}

#[test]
fn forward_and_backward_run_on_the_pool_of_the_layer() {
    let pool = Arc::new(Counting::default());
    let frozen = Nf4Linear::new(weight(true), None).unwrap();
    let vars = VarMap::new();
    let trained = QLoRALinear::new(NAME, weight(true), None, &adapter(), &vars).unwrap();
    let x = Var::from_tensor(&tensor(&values(4 * D_IN, 5), &[4, D_IN])).unwrap();
    let layers: [(&dyn Module, &dyn Module); 2] = [
        (&frozen, &frozen.clone().with_threads(pool.clone())),
        (&trained, &trained.clone().with_threads(pool.clone())),
    ];
    for (layer, pooled) in layers {
        let of = |layer: &dyn Module, counts: bool| {
            let start = pool.0.load(Ordering::Relaxed);
            let y = layer.forward(&x).unwrap();
            let forward = pool.0.load(Ordering::Relaxed);
            let gradients = y.sqr().unwrap().backward().unwrap();
            let backward = pool.0.load(Ordering::Relaxed);
            assert_eq!((forward > start, backward > forward), (counts, counts));
            (flat(&y), flat(gradients.get(&x).unwrap()))
        };
        assert_eq!(of(layer, false), of(pooled, true));
    }
}

#[test]
fn outputs_and_gradients_are_those_of_the_layer() {
    for (adapter, arithmetic) in
        [adapter(), dora()].iter().flat_map(|a| [(a, Arithmetic::F32), (a, Arithmetic::SixteenByFour)])
    {
        for batch in [1, 2, 7, 64, 65] {
            let (mut layer, linear, vars) = both(arithmetic, adapter);
            let (x, dy) = (values(batch * D_IN, 5), values(batch * D_OUT, 6));
            let input = Var::from_slice(&x, (batch, D_IN), &Device::Cpu).unwrap();
            let y = linear.forward(&input).unwrap();
            let x = nf4::Tensor::from_vec(x, false);
            let expected = layer.forward(&x);
            assert_eq!(flat(&y), expected.data(), "{arithmetic:?}, {batch}");

            let loss = (&y * tensor(&dy, &[batch, D_OUT])).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let dx = layer.backward(&x, &nf4::Tensor::from_vec(dy, false));
            assert_eq!(flat(gradients.get(&input).unwrap()), dx.data(), "{arithmetic:?}, {batch}");
            let params = layer.trainable_params();
            assert_eq!((params.len(), vars.all_vars().len()), (linear.variables().count(), params.len()));
            for (variable, param) in linear.variables().zip(params) {
                assert_eq!(flat(gradients.get(variable).unwrap()), param.grad().unwrap(), "{arithmetic:?}, {batch}");
            }

            // A second backward has the gradients of the first; one after a step those of the values before it.
            for var in vars.all_vars() {
                var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
            }
            let again = loss.backward().unwrap();
            for variable in linear.variables().chain([input.as_tensor()]) {
                assert_eq!(flat(again.get(variable).unwrap()), flat(gradients.get(variable).unwrap()));
            }
            // The norms are those of the new values.
            for param in layer.trainable_params() {
                param.data_mut().iter_mut().for_each(|value| *value *= 1.5);
            }
            layer.refresh_dora().unwrap();
            assert_eq!(flat(&linear.forward(&input).unwrap()), layer.forward(&x).data());
        }
    }
}

#[test]
fn a_frozen_layer_has_the_outputs_and_gradients_without_an_adapter() {
    for arithmetic in [Arithmetic::F32, Arithmetic::SixteenByFour] {
        for batch in [1, 2, 7, 64] {
            let (mut layer, ..) = both(arithmetic, &adapter());
            layer.lora_b_mut().data_mut().fill(0.0);
            let x = values(batch * D_IN, 5);
            let input = Var::from_slice(&x, (batch, D_IN), &Device::Cpu).unwrap();
            let x = nf4::Tensor::from_vec(x, false);
            let frozen = Nf4Linear::new(weight(true), Some(bias())).unwrap().with_arithmetic(arithmetic);
            let y = frozen.forward(&input).unwrap();
            assert_eq!(flat(&y), layer.forward(&x).data());
            let gradients = y.sum_all().unwrap().backward().unwrap();
            let ones = nf4::Tensor::from_vec(vec![1.0; batch * D_OUT], false);
            assert_eq!(flat(gradients.get(&input).unwrap()), layer.backward(&x, &ones).data());
        }
    }
}

/// The magnitude of an adapter that has none yet is made of norms, with which it changes nothing: as in PEFT.
#[test]
fn fresh_adapters_change_nothing() {
    let fresh = LoRAAdapter::new(D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard, 0).unwrap();
    let x = tensor(&values(3 * D_IN, 5), &[3, D_IN]);
    let frozen = Nf4Linear::new(weight(true), Some(bias())).unwrap().forward(&x).unwrap();
    let (_, linear, vars) = both(Arithmetic::SixteenByFour, &fresh.clone().with_dora());
    assert_eq!(flat(linear.magnitude().unwrap()), norms(&fresh));
    assert_eq!(flat(&linear.forward(&x).unwrap()), flat(&frozen));
    assert_eq!(vars.all_vars().len(), 3);
    assert!(linear.adapter().unwrap().is_dora());
    assert_eq!(format!("{linear:?}"), format!("QLoRALinear({NAME}: 48, 128, rank 4, DoRA)"));
    let (_, linear, _) = both(Arithmetic::SixteenByFour, &fresh);
    assert_eq!(flat(&linear.forward(&x).unwrap()), flat(&frozen));
    assert!(linear.magnitude().is_none() && !linear.adapter().unwrap().is_dora());
}

/// The loss is linear in each variable and the input, so central differences have no error but rounding: with values below 1,
/// sums of 128 products and a step of 1/8, less than `1e-4`. Gradients are of the size of 1. `DoRA` counts norms as constants,
/// and so do the differences: where a step changes the norms, the magnitude follows, and the gains stay what they were but for
/// a rounding, `2^-24` of an output.
#[test]
fn gradients_are_finite_differences() {
    const STEP: f32 = 0.125;
    let x = Var::from_slice(&values(3 * D_IN, 5), (3, D_IN), &Device::Cpu).unwrap();
    let dy = tensor(&values(3 * D_OUT, 6), &[3, D_OUT]);
    let [(_, lora, _), (_, dora, _)] = [adapter(), dora()].map(|adapter| both(Arithmetic::F32, &adapter));
    let frozen = Nf4Linear::new(weight(true), None).unwrap().with_arithmetic(Arithmetic::F32);
    let of = |layer: &QLoRALinear| layer.variables().cloned().collect();
    let layers: [(&dyn Module, Vec<Tensor>); 3] = [(&lora, of(&lora)), (&dora, of(&dora)), (&frozen, Vec::new())];
    for (layer, variables) in layers {
        let exact = || {
            let y = layer.forward(&x).unwrap();
            flat(&y).iter().zip(flat(&dy)).map(|(y, dy)| f64::from(*y) * f64::from(dy)).sum::<f64>()
        };
        let loss = (layer.forward(&x).unwrap() * &dy).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let magnitude = variables.get(2).map(|magnitude| (magnitude, flat(magnitude), norms(&dora.adapter().unwrap())));
        for (which, tensor_of) in variables.iter().chain([x.as_tensor()]).enumerate() {
            let var = Var::from_tensor(tensor_of).unwrap();
            let gradient = flat(gradients.get(&var).unwrap());
            let (start, shape) = (flat(&var), var.dims().to_vec());
            let keep_gains = || {
                let Some((variable, values, before)) = magnitude.as_ref().filter(|_| which < 2) else { return };
                let now = norms(&dora.adapter().unwrap());
                let moved: Vec<f32> =
                    values.iter().zip(now).zip(before).map(|((m, now), before)| m * now / before).collect();
                Var::from_tensor(variable).unwrap().set(&tensor(&moved, &[D_OUT])).unwrap();
            };
            for place in (0..start.len()).step_by(17) {
                let moved = |step: f32| {
                    let mut values = start.clone();
                    values[place] += step;
                    var.set(&tensor(&values, &shape)).unwrap();
                    keep_gains();
                    exact()
                };
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                let error = (difference - f64::from(gradient[place])).abs();
                assert!(error < 1e-4, "{shape:?} {place}: {difference} {}", gradient[place]);
            }
            var.set(&tensor(&start, &shape)).unwrap();
            keep_gains();
        }
    }
}

#[test]
fn halves_are_rounded_once() {
    fn check<T: Float + candle_core::WithDType>(dtype: DType, adapter: &LoRAAdapter) {
        let (layer, linear, _) = both(Arithmetic::SixteenByFour, adapter);
        let x: Vec<T> = values(5 * D_IN, 7).into_iter().map(<T as Float>::from_f32).collect();
        let mut expected = vec![<T as Float>::from_f32(0.0); 5 * D_OUT];
        layer.forward_into(&x, &mut layer.scratch(5), &mut expected).unwrap();
        let x = Var::from_slice(&x, (5, D_IN), &Device::Cpu).unwrap();
        let y = linear.forward(&x).unwrap();
        assert_eq!(y.dtype(), dtype);
        assert_eq!(flat(&y), expected.into_iter().map(<T as Float>::to_f32).collect::<Vec<_>>());
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&x).unwrap().dtype(), dtype);
        assert!(linear.variables().all(|variable| gradients.get(variable).unwrap().dtype() == DType::F32));
        // What is rounded to the type of the input is the gradient in f32.
        let wide = Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap();
        let exact = linear.forward(&wide).unwrap().sum_all().unwrap().backward().unwrap();
        let rounded = exact.get(&wide).unwrap().to_dtype(dtype).unwrap();
        assert_eq!(flat(gradients.get(&x).unwrap()), flat(&rounded));
        for variable in linear.variables() {
            assert_eq!(flat(gradients.get(variable).unwrap()), flat(exact.get(variable).unwrap()));
        }
    }
    for adapter in [adapter(), dora()] {
        check::<f16>(DType::F16, &adapter);
        check::<bf16>(DType::BF16, &adapter);
    }
}

#[test]
fn strides_and_dimensions_change_nothing() {
    let [(_, linear, _), (_, dora, _)] = [adapter(), dora()].map(|adapter| both(Arithmetic::SixteenByFour, &adapter));
    let frozen = Nf4Linear::new(weight(true), Some(bias())).unwrap();
    let x = Var::from_slice(&values(24 * D_IN, 8), (24, D_IN), &Device::Cpu).unwrap();
    for layer in [&linear as &dyn Module, &dora, &frozen] {
        let whole = layer.forward(&x).unwrap();
        for shape in [&[24][..], &[4, 6], &[2, 3, 4], &[2, 1, 3, 4]] {
            let [input, output] = [D_IN, D_OUT].map(|last| [shape, &[last]].concat());
            let y = layer.forward(&x.reshape(input).unwrap()).unwrap();
            assert_eq!(y.dims(), output);
            assert_eq!(flat(&y), flat(&whole));
        }
        let one = layer.forward(&x.get(5).unwrap()).unwrap();
        assert_eq!(one.dims(), [D_OUT]);
        assert_eq!(flat(&one), flat(&whole.get(5).unwrap()));
        assert_eq!(layer.forward(&x.narrow(0, 3, 0).unwrap()).unwrap().dims(), [0, D_OUT]);

        // Columns first, a part with an offset, and one vector many times.
        let columns = x.t().unwrap().contiguous().unwrap().t().unwrap();
        assert!(!columns.is_contiguous());
        assert_eq!(flat(&layer.forward(&columns).unwrap()), flat(&whole));
        let part = x.narrow(0, 7, 9).unwrap();
        assert_eq!(flat(&layer.forward(&part).unwrap()), flat(&whole.narrow(0, 7, 9).unwrap()));
        let wide = Tensor::cat(&[x.as_tensor(), x.as_tensor()], 1).unwrap().narrow(1, D_IN, D_IN).unwrap();
        assert_eq!(flat(&layer.forward(&wide).unwrap()), flat(&whole));
        let many = x.narrow(0, 2, 1).unwrap().broadcast_as((3, D_IN)).unwrap();
        assert_eq!(flat(&layer.forward(&many).unwrap().get(2).unwrap()), flat(&whole.get(2).unwrap()));

        // And gradients find their way back through them.
        let gradient = |y: Tensor| {
            let dy = tensor(&values(24 * D_OUT, 9), &[24, D_OUT]);
            flat((y * dy).unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap())
        };
        let exact = gradient(whole.clone());
        assert_eq!(gradient(layer.forward(&columns).unwrap()), exact);
        let batched = layer.forward(&x.reshape((2, 3, 4, D_IN)).unwrap()).unwrap();
        assert_eq!(gradient(batched.reshape((24, D_OUT)).unwrap()), exact);
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (_, linear, vars) = both(Arithmetic::SixteenByFour, &adapter());
    let frozen = Nf4Linear::new(weight(false), None).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    for layer in [&linear as &dyn Module, &frozen] {
        for shape in [&[][..], &[1], &[D_IN + 1], &[D_IN, 2], &[2, D_OUT], &[3, 0]] {
            let error = layer.forward(&zeros(shape, DType::F32)).unwrap_err().to_string();
            assert!(error.contains("does not end with 128 values"), "{shape:?}: {error}");
        }
        for dtype in [DType::F64, DType::U8, DType::U32, DType::I64] {
            let error = layer.forward(&zeros(&[2, D_IN], dtype)).unwrap_err().to_string();
            assert!(error.contains("nsupported dtype"), "{dtype:?}: {error}");
        }
    }

    let new = |name, weight, bias, adapter: &LoRAAdapter| {
        QLoRALinear::new(name, weight, bias, adapter, &vars).unwrap_err().to_string()
    };
    let small = LoRAAdapter::new(D_OUT, 64, RANK, 8.0, LoRAScaling::Standard, 0).unwrap();
    assert!(new("other", weight(true), None, &small).contains("[48, 64]"));
    assert!(new("other", weight(true), Some(vec![0.0; 3]), &adapter()).contains("bias"));
    assert!(new("other", weight(true), Some(vec![f32::NAN; D_OUT]), &adapter()).contains("not finite"));
    let mut infinite = dora();
    infinite.magnitude_mut().unwrap().data_mut()[1] = f32::INFINITY;
    assert!(new("other", weight(true), None, &infinite).contains("lora_magnitude_vector: value 1 is inf"));
    let mut short = dora();
    *short.magnitude_mut().unwrap() = nf4::Tensor::zeros(3, true);
    assert!(new("other", weight(true), None, &short).contains("lora_magnitude_vector: expected length 48, got 3"));
    let wide = LoRAAdapter::new(D_OUT, D_IN, RANK + 1, 8.0, LoRAScaling::Standard, 0).unwrap();
    assert!(new(NAME, weight(true), None, &wide).contains("lora_A"), "another rank than the variable there");
    assert_eq!(vars.all_vars().len(), 2, "layers that failed left nothing behind");
    let others = VarMap::new();
    let full = format!("base_model.model.{NAME}.lora_magnitude_vector");
    others.data().lock().unwrap().insert(full, Var::zeros(D_OUT + 1, DType::F32, &Device::Cpu).unwrap());
    let error = QLoRALinear::new(NAME, weight(true), None, &dora(), &others).unwrap_err().to_string();
    assert!(error.contains("lora_magnitude_vector is [49] in F32; expected [48] in F32"), "{error}");
    assert_eq!(others.all_vars().len(), 1);
    assert!(Nf4Linear::new(weight(true), Some(vec![0.0; 3])).is_err());

    // Variables that became NaN.
    for adapter in [adapter(), dora()] {
        let (_, linear, _) = both(Arithmetic::SixteenByFour, &adapter);
        let last = Var::from_tensor(linear.variables().last().unwrap()).unwrap();
        last.set(&Tensor::full(f32::NAN, last.shape(), &Device::Cpu).unwrap()).unwrap();
        let error = linear.forward(&zeros(&[1, D_IN], DType::F32)).unwrap_err().to_string();
        assert!(error.contains("not finite"), "{error}");
        assert!(linear.adapter().is_err());
    }
}

/// No gradient for the input is computed where no variable leads to it.
#[test]
fn inputs_without_variables_have_no_gradient() {
    for adapter in [adapter(), dora()] {
        let (_, linear, _) = both(Arithmetic::F32, &adapter);
        let x = tensor(&values(2 * D_IN, 5), &[2, D_IN]);
        let gradients = linear.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(&x).is_none());
        assert!(linear.variables().all(|variable| gradients.get(variable).is_some()));
        let detached = linear.forward_detached(&x).unwrap();
        assert!(!detached.track_op());
        assert_eq!(flat(&detached), flat(&linear.forward(&x).unwrap()));
    }
}

#[test]
fn threads_share_a_layer() {
    let (_, linear, _) = both(Arithmetic::SixteenByFour, &dora());
    let x = tensor(&values(8 * D_IN, 5), &[8, D_IN]);
    let step = || {
        let y = linear.forward(&x).unwrap();
        flat(y.sum_all().unwrap().backward().unwrap().get(linear.b()).unwrap())
    };
    let alone = step();
    (0..64).into_par_iter().for_each(|_| assert_eq!(step(), alone));
}

/// The adapter learns another one of its kind.
#[test]
fn an_optimizer_of_candle_trains() {
    let (a, b) = (values(RANK * D_IN, 20), values(D_OUT * RANK, 21));
    let other = LoRAAdapter::from_parts(a, b, D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard).unwrap();
    let longer = norms(&other).iter().map(|norm| 1.25 * norm).collect();
    for (start, other) in [(adapter(), other.clone()), (dora(), other.with_magnitude(longer).unwrap())] {
        let (_, linear, vars) = both(Arithmetic::F32, &start);
        let target = QLoRALinear::new(NAME, weight(true), Some(bias()), &other, &VarMap::new()).unwrap();
        let x = tensor(&values(64 * D_IN, 5), &[64, D_IN]);
        let wanted = target.forward(&x).unwrap().detach();
        let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 0.03, ..Default::default() }).unwrap();
        let mut losses = Vec::new();
        for _ in 0..60 {
            let loss = (linear.forward(&x).unwrap() - &wanted).unwrap().sqr().unwrap().mean_all().unwrap();
            optimizer.backward_step(&loss).unwrap();
            losses.push(loss.to_scalar::<f32>().unwrap());
        }
        assert!(losses[59] < 0.2 * losses[0], "{losses:?}");
    }
}
