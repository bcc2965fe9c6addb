//! Forward and autograd of both layers, against the layers of `nf4` and finite differences.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarMap};
use half::{bf16, f16};
use nf4::{Arithmetic, BlockSize, Float, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit};
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

fn bias() -> Vec<f32> {
    values(D_OUT, 4)
}

/// A layer of `nf4` and its counterpart in candle.
fn both(arithmetic: Arithmetic) -> (QLoRALayer, QLoRALinear, VarMap) {
    let vars = VarMap::new();
    let linear = QLoRALinear::new(NAME, weight(true), Some(bias()), &adapter(), &vars).unwrap();
    let layer = QLoRALayer::from_parts(weight(true), adapter()).unwrap().with_bias(bias()).unwrap();
    (layer.with_arithmetic(arithmetic), linear.with_arithmetic(arithmetic), vars)
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[test]
fn outputs_and_gradients_are_those_of_the_layer() {
    for arithmetic in [Arithmetic::F32, Arithmetic::SixteenByFour] {
        for batch in [1, 2, 7, 64] {
            let (mut layer, linear, _) = both(arithmetic);
            let (x, dy) = (values(batch * D_IN, 5), values(batch * D_OUT, 6));
            let input = Var::from_slice(&x, (batch, D_IN), &Device::Cpu).unwrap();
            let y = linear.forward(&input).unwrap();
            let x = nf4::Tensor::from_vec(x, false);
            assert_eq!(flat(&y), layer.forward(&x).data(), "{arithmetic:?}, {batch}");

            let gradients = (y * tensor(&dy, &[batch, D_OUT])).unwrap().sum_all().unwrap().backward().unwrap();
            let dx = layer.backward(&x, &nf4::Tensor::from_vec(dy, false));
            assert_eq!(flat(gradients.get(&input).unwrap()), dx.data(), "{arithmetic:?}, {batch}");
            assert_eq!(flat(gradients.get(linear.a()).unwrap()), layer.lora_a().grad().unwrap());
            assert_eq!(flat(gradients.get(linear.b()).unwrap()), layer.lora_b().grad().unwrap());

            // The frozen layer: the same without the adapter's part.
            let frozen = Nf4Linear::new(weight(true), Some(bias())).unwrap().with_arithmetic(arithmetic);
            layer.lora_b_mut().data_mut().fill(0.0);
            let y = frozen.forward(&input).unwrap();
            assert_eq!(flat(&y), layer.forward(&x).data());
            let gradients = y.sum_all().unwrap().backward().unwrap();
            let ones = nf4::Tensor::from_vec(vec![1.0; batch * D_OUT], false);
            assert_eq!(flat(gradients.get(&input).unwrap()), layer.backward(&x, &ones).data());
        }
    }
}

/// The loss is linear in each of the three, so central differences have no error but rounding: with values below 1, sums of
/// 128 products and a step of 1/8, less than `1e-4`. Gradients are of the size of 1.
#[test]
fn gradients_are_finite_differences() {
    const STEP: f32 = 0.125;
    let (_, linear, vars) = both(Arithmetic::F32);
    let frozen = Nf4Linear::new(weight(true), None).unwrap().with_arithmetic(Arithmetic::F32);
    let x = Var::from_slice(&values(3 * D_IN, 5), (3, D_IN), &Device::Cpu).unwrap();
    let dy = tensor(&values(3 * D_OUT, 6), &[3, D_OUT]);
    let layers: [(&dyn Module, Vec<Var>); 2] =
        [(&linear, vars.all_vars().into_iter().chain([x.clone()]).collect()), (&frozen, vec![x.clone()])];
    for (layer, variables) in layers {
        let loss = || (layer.forward(&x)? * &dy)?.sum_all();
        let exact = || {
            let y = layer.forward(&x).unwrap();
            flat(&y).iter().zip(flat(&dy)).map(|(y, dy)| f64::from(*y) * f64::from(dy)).sum::<f64>()
        };
        let gradients = loss().unwrap().backward().unwrap();
        for var in variables {
            let gradient = flat(gradients.get(&var).unwrap());
            let (start, shape) = (flat(&var), var.dims().to_vec());
            for place in (0..start.len()).step_by(17) {
                let moved = |step: f32| {
                    let mut values = start.clone();
                    values[place] += step;
                    var.set(&tensor(&values, &shape)).unwrap();
                    exact()
                };
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                let error = (difference - f64::from(gradient[place])).abs();
                assert!(error < 1e-4, "{shape:?} {place}: {difference} {}", gradient[place]);
            }
            var.set(&tensor(&start, &shape)).unwrap();
        }
    }
}

#[test]
fn halves_are_rounded_once() {
    fn check<T: Float + candle_core::WithDType>(dtype: DType) {
        let (layer, linear, _) = both(Arithmetic::SixteenByFour);
        let x: Vec<T> = values(5 * D_IN, 7).into_iter().map(<T as Float>::from_f32).collect();
        let mut expected = vec![<T as Float>::from_f32(0.0); 5 * D_OUT];
        layer.forward_into(&x, &mut layer.scratch(5), &mut expected).unwrap();
        let x = Var::from_slice(&x, (5, D_IN), &Device::Cpu).unwrap();
        let y = linear.forward(&x).unwrap();
        assert_eq!(y.dtype(), dtype);
        assert_eq!(flat(&y), expected.into_iter().map(<T as Float>::to_f32).collect::<Vec<_>>());
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&x).unwrap().dtype(), dtype);
        assert_eq!(gradients.get(linear.a()).unwrap().dtype(), DType::F32);
        // What is rounded to the type of the input is the gradient in f32.
        let wide = Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap();
        let exact = linear.forward(&wide).unwrap().sum_all().unwrap().backward().unwrap();
        let rounded = exact.get(&wide).unwrap().to_dtype(dtype).unwrap();
        assert_eq!(flat(gradients.get(&x).unwrap()), flat(&rounded));
    }
    check::<f16>(DType::F16);
    check::<bf16>(DType::BF16);
}

#[test]
fn strides_and_dimensions_change_nothing() {
    let (_, linear, _) = both(Arithmetic::SixteenByFour);
    let frozen = Nf4Linear::new(weight(true), Some(bias())).unwrap();
    let x = Var::from_slice(&values(24 * D_IN, 8), (24, D_IN), &Device::Cpu).unwrap();
    for layer in [&linear as &dyn Module, &frozen] {
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
    let (_, linear, vars) = both(Arithmetic::SixteenByFour);
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
    assert!(new("other", weight(true), None, &adapter().with_dora()).contains("DoRA"));
    let wide = LoRAAdapter::new(D_OUT, D_IN, RANK + 1, 8.0, LoRAScaling::Standard, 0).unwrap();
    assert!(new(NAME, weight(true), None, &wide).contains("lora_A"), "another rank than the variable there");
    assert_eq!(vars.all_vars().len(), 2, "layers that failed left nothing behind");
    assert!(Nf4Linear::new(weight(true), Some(vec![0.0; 3])).is_err());

    // Variables that became NaN.
    vars.all_vars()[0].set(&Tensor::full(f32::NAN, vars.all_vars()[0].shape(), &Device::Cpu).unwrap()).unwrap();
    let error = linear.forward(&zeros(&[1, D_IN], DType::F32)).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
    assert!(linear.adapter().is_err());
}

/// No gradient for the input is computed where no variable leads to it.
#[test]
fn inputs_without_variables_have_no_gradient() {
    let (_, linear, _) = both(Arithmetic::F32);
    let x = tensor(&values(2 * D_IN, 5), &[2, D_IN]);
    let gradients = linear.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&x).is_none());
    assert!(gradients.get(linear.a()).is_some());
    let detached = linear.forward_detached(&x).unwrap();
    assert!(!detached.track_op());
    assert_eq!(flat(&detached), flat(&linear.forward(&x).unwrap()));
}

#[test]
fn threads_share_a_layer() {
    let (_, linear, _) = both(Arithmetic::SixteenByFour);
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
    let (_, linear, vars) = both(Arithmetic::F32);
    let (a, b) = (values(RANK * D_IN, 20), values(D_OUT * RANK, 21));
    let other = LoRAAdapter::from_parts(a, b, D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard).unwrap();
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
