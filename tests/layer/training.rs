//! Gradients against f64 and against finite differences, and the optimizers against their formulas.

use nf4::optim::{AdamW, Sgd};
use nf4::{
    Arithmetic, BackwardScratch, BlockSize, LoRAAdapter, LoRALayer, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor,
};

use crate::truth::EPS;
use crate::{adapter, all_kernels, bits, layer, normal};

/// `[d_out, d_in]`, rank, batch: aligned and straddling rows, odd ones, more rows than a chunk of the sums, ranks
/// larger than a block and than the layer.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 1),
    (3, 2, 5, 2),
    (7, 65, 3, 4),
    (5, 63, 2, 1),
    (9, 96, 8, 5),
    (6, 128, 100, 3),
    (33, 192, 16, 7),
    (600, 64, 4, 2),
    (4, 70, 130, 521),
];

/// A value in f64, and what rounding may change of it.
#[derive(Debug, Clone, Copy, Default)]
struct Truth {
    value: f64,
    bound: f64,
}

impl Truth {
    /// An f32 value.
    fn of(value: &f32) -> Self {
        Self { value: f64::from(*value), bound: 0.0 }
    }

    /// A sum of products of two values each, in which each term is rounded this number of times.
    fn sum(terms: impl Iterator<Item = (Self, Self)>, roundings: usize) -> Self {
        let (mut sum, mut magnitude) = (Self::default(), 0.0);
        for (x, y) in terms {
            let [x_abs, y_abs] = [x, y].map(|t| t.value.abs() + t.bound);
            sum.value += x.value * y.value;
            sum.bound += x_abs * y.bound + y_abs * x.bound;
            magnitude += x_abs * y_abs;
        }
        // Products of roundings are far below a thousandth.
        sum.bound += roundings as f64 * EPS * magnitude * 1.001;
        sum
    }

    fn times(self, factor: f64) -> Self {
        let bound = self.bound * factor.abs();
        Self { value: self.value * factor, bound: bound + EPS * (self.value * factor).abs() }
    }

    fn plus(self, other: Self) -> Self {
        let value = self.value + other.value;
        let bound = self.bound + other.bound;
        Self { value, bound: bound + EPS * (value.abs() + bound) }
    }
}

/// The roundings of a term in a sum of `n` of them: a product (two with the scale of a block), two additions of
/// fours, one for each four of a chunk and one for each chunk.
fn roundings(n: usize) -> usize {
    4 + n.min(512).div_ceil(4) + n.div_ceil(512)
}

struct Gradients {
    a: Vec<Truth>,
    b: Vec<Truth>,
    x: Vec<Truth>,
}

/// The formulas, element by element.
fn gradients(weight: &[f32], adapter: &LoRAAdapter, x: &[f32], dy: &[f32]) -> Gradients {
    let (d_out, d_in, rank, scale) = (adapter.d_out(), adapter.d_in(), adapter.rank(), f64::from(adapter.scale()));
    let (a, b) = (adapter.a().data(), adapter.b().data());
    let batch = x.len() / d_in;
    let (x, dy): (Vec<_>, Vec<_>) = (x.iter().map(Truth::of).collect(), dy.iter().map(Truth::of).collect());
    let [a, b, weight] = [a, b, weight].map(|m| m.iter().map(Truth::of).collect::<Vec<_>>());
    let dot = |n, terms: &dyn Fn(usize) -> (Truth, Truth), each| Truth::sum((0..n).map(terms), each);
    let table = |rows: usize, cols: usize, f: &dyn Fn(usize, usize) -> Truth| -> Vec<Truth> {
        (0..rows * cols).map(|i| f(i / cols, i % cols)).collect()
    };
    // `x A^T` has eight lanes.
    let u = table(batch, rank, &|n, k| dot(d_in, &|i| (x[n * d_in + i], a[k * d_in + i]), d_in / 8 + 5).times(scale));
    let v = table(batch, rank, &|n, k| {
        dot(d_out, &|o| (dy[n * d_out + o], b[o * rank + k]), roundings(d_out)).times(scale)
    });
    Gradients {
        a: table(rank, d_in, &|k, i| dot(batch, &|n| (v[n * rank + k], x[n * d_in + i]), roundings(batch))),
        b: table(d_out, rank, &|o, k| dot(batch, &|n| (dy[n * d_out + o], u[n * rank + k]), roundings(batch))),
        x: table(batch, d_in, &|n, i| {
            let base = dot(d_out, &|o| (dy[n * d_out + o], weight[o * d_in + i]), roundings(d_out) + 1);
            base.plus(dot(rank, &|k| (v[n * rank + k], a[k * d_in + i]), roundings(rank)))
        }),
    }
}

fn check(name: &str, expected: &[Truth], got: &[f32]) {
    assert_eq!(expected.len(), got.len(), "{name}");
    for (i, (e, g)) in expected.iter().zip(got).enumerate() {
        let error = (f64::from(*g) - e.value).abs();
        assert!(error <= e.bound, "{name}: value {i}: got {g}, exact {}, off {error:e} > {:e}", e.value, e.bound);
    }
}

#[test]
fn gradients_are_near_f64_with_the_same_bits_on_every_instruction_set() {
    let kernels = all_kernels();
    for (d_out, d_in, rank, batch) in SHAPES {
        for (block, double_quant) in [(BlockSize::B32, false), (BlockSize::B64, true), (BlockSize::B128, false)] {
            let name = format!("{d_out}x{d_in}, rank {rank}, batch {batch}, block {}", block.get());
            let (x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
            let fresh = layer(d_out, d_in, rank, block, double_quant).with_arithmetic(Arithmetic::F32);
            let expected = gradients(&fresh.base_weight_quantized().dequantize(), fresh.adapter(), &x, &dy);
            let (x, dy) = (Tensor::from_vec(x, false), Tensor::from_vec(dy, false));
            let mut first: Option<[Vec<u32>; 3]> = None;
            for k in &kernels {
                let mut layer = fresh.clone().with_kernels(*k);
                let dx = layer.backward(&x, &dy);
                let grad = |t: &Tensor| t.grad().unwrap().to_vec();
                let (da, db) = (grad(layer.lora_a()), grad(layer.lora_b()));
                check(&format!("{name}: dA"), &expected.a, &da);
                check(&format!("{name}: dB"), &expected.b, &db);
                check(&format!("{name}: dx"), &expected.x, dx.data());
                let got = [bits(&da), bits(&db), bits(dx.data())];
                assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{name}, {}", k.isa());
            }
        }
    }
}

/// What the integers of the transposed 16x4 product change of a column at most: half a step, 8191 of which are the largest
/// weight or gradient, for each number of a sum.
fn rounding_to_integers(weight: &[f32], d_in: usize, dy: &[f32], column: usize) -> f64 {
    let largest = |x: &[f32]| f64::from(x.iter().fold(0.0_f32, |m, x| m.max(x.abs())));
    let (of_weights, of_gradients) = (largest(weight) / 16382.0, largest(dy) / 16382.0);
    let terms = weight.chunks(d_in).zip(dy).map(|(row, dy)| {
        let (w, dy) = (f64::from(row[column].abs()), f64::from(dy.abs()));
        w * of_gradients + dy * of_weights + of_weights * of_gradients
    });
    1.001 * terms.sum::<f64>()
}

/// They take integers where rows are whole groups of columns; nothing but the gradient of the input depends on it.
#[test]
fn input_gradients_of_integers_are_near_f64_with_the_same_bits_on_every_instruction_set() {
    let kernels = all_kernels();
    for (d_out, d_in, rank, batch) in SHAPES {
        for (block, double_quant) in [(BlockSize::B32, false), (BlockSize::B64, true), (BlockSize::B128, false)] {
            let name = format!("{d_out}x{d_in}, rank {rank}, batch {batch}, block {}", block.get());
            let (x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
            let fresh = layer(d_out, d_in, rank, block, double_quant);
            let weight = fresh.base_weight_quantized().dequantize::<f32>();
            let expected = gradients(&weight, fresh.adapter(), &x, &dy);
            let run = |mut layer: QLoRALayer| {
                let dx = layer.backward(&Tensor::from_vec(x.clone(), false), &Tensor::from_vec(dy.clone(), false));
                let grad = |t: &Tensor| bits(t.grad().unwrap());
                (dx.data().to_vec(), grad(layer.lora_a()), grad(layer.lora_b()))
            };
            let exact = run(fresh.clone().with_arithmetic(Arithmetic::F32));
            let mut first: Option<Vec<u32>> = None;
            for k in &kernels {
                for arithmetic in [Arithmetic::SixteenByFour, Arithmetic::EightByEight] {
                    let name = format!("{name}, {}, {arithmetic:?}", k.isa());
                    let (dx, da, db) = run(fresh.clone().with_arithmetic(arithmetic).with_kernels(*k));
                    assert_eq!((&da, &db), (&exact.1, &exact.2), "{name}");
                    assert_eq!(&bits(&dx), first.get_or_insert_with(|| bits(&dx)), "{name}");
                    if !d_in.is_multiple_of(32) {
                        assert_eq!(bits(&dx), bits(&exact.0), "{name}");
                        continue;
                    }
                    assert_ne!(bits(&dx), bits(&exact.0), "{name}");
                    for (i, (e, g)) in expected.x.iter().zip(&dx).enumerate() {
                        let bound =
                            e.bound + rounding_to_integers(&weight, d_in, &dy[i / d_in * d_out..][..d_out], i % d_in);
                        let error = (f64::from(*g) - e.value).abs();
                        assert!(error <= bound, "{name}: value {i}: got {g}, off {error:e} > {bound:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn gradients_of_a_dense_layer_are_near_f64_merged_or_not() {
    for (d_out, d_in, rank, batch) in SHAPES {
        let weight = normal(d_out * d_in, 0.02, 1);
        let (x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
        let expected = gradients(&weight, &adapter(d_out, d_in, rank), &x, &dy);
        let (x, dy) = (Tensor::from_vec(x, false), Tensor::from_vec(dy, false));
        let weight = Tensor::from_vec(weight, false);
        let mut layer = LoRALayer::from_parts(weight, adapter(d_out, d_in, rank)).unwrap();
        for merged in [false, true] {
            let name = format!("{d_out}x{d_in}, rank {rank}, batch {batch}, merged {merged}");
            layer.zero_grad();
            let dx = layer.backward(&x, &dy);
            check(&format!("{name}: dA"), &expected.a, layer.lora_a().grad().unwrap());
            check(&format!("{name}: dB"), &expected.b, layer.lora_b().grad().unwrap());
            check(&format!("{name}: dx"), &expected.x, dx.data());
            layer.merge();
        }
    }
}

/// `sum of dy * y` in f64.
fn objective(layer: &QLoRALayer, x: &[f32], dy: &[f32]) -> f64 {
    let (a, b) = (layer.lora_a().data(), layer.lora_b().data());
    let (weight, scale) = (layer.base_weight_quantized().dequantize::<f32>(), f64::from(layer.scale()));
    let dot = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| f64::from(*p) * f64::from(*q)).sum::<f64>();
    let mut sum = 0.0;
    for (x, dy) in x.chunks(layer.d_in()).zip(dy.chunks(layer.d_out())) {
        let low_rank: Vec<f64> = a.chunks(x.len()).map(|a| dot(a, x)).collect();
        for ((dy, w), b) in dy.iter().zip(weight.chunks(x.len())).zip(b.chunks(low_rank.len())) {
            let adapter: f64 = b.iter().zip(&low_rank).map(|(b, u)| f64::from(*b) * u).sum();
            sum += f64::from(*dy) * (dot(w, x) + scale * adapter);
        }
    }
    sum
}

#[test]
fn gradients_agree_with_finite_differences() {
    let (d_out, d_in, rank, batch) = (6, 70, 3, 4);
    let mut layer = layer(d_out, d_in, rank, BlockSize::B64, true);
    let (mut x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
    let dx = layer.backward(&Tensor::from_vec(x.clone(), false), &Tensor::from_vec(dy.clone(), false));
    let [da, db] = [layer.lora_a(), layer.lora_b()].map(|t| t.grad().unwrap().to_vec());

    // The objective is linear in each single value, so a central difference has no error but rounding, that of f32
    // gradients. Steps are powers of two; the step that was made is divided by, for adding it rounds.
    let mut compare =
        |name: &str, gradient: &[f32], change: &mut dyn FnMut(&mut QLoRALayer, &mut [f32], usize, f32)| {
            let largest = gradient.iter().fold(0.0_f32, |m, g| m.max(g.abs()));
            for (i, g) in gradient.iter().enumerate() {
                let mut at = |step: f32| {
                    change(&mut layer, &mut x, i, step);
                    let value = objective(&layer, &x, &dy);
                    change(&mut layer, &mut x, i, -step);
                    value
                };
                let difference = (at(0.125) - at(-0.125)) / 0.25;
                let error = (difference - f64::from(*g)).abs();
                assert!(error <= 3e-6 * f64::from(largest), "{name}[{i}]: gradient {g}, difference {difference}");
            }
        };
    compare("x", dx.data(), &mut |_, x, i, step| x[i] += step);
    compare("A", &da, &mut |layer, _, i, step| layer.lora_a_mut().data_mut()[i] += step);
    compare("B", &db, &mut |layer, _, i, step| layer.lora_b_mut().data_mut()[i] += step);
}

#[test]
fn gradients_accumulate_until_they_are_zeroed() {
    let mut layer = layer(5, 64, 3, BlockSize::B64, false);
    let (x, dy) = (Tensor::from_vec(normal(64, 1.0, 4), false), Tensor::from_vec(normal(5, 1.0, 5), false));
    let grads = |l: &QLoRALayer| [l.lora_a(), l.lora_b()].map(|t| t.grad().unwrap().to_vec());
    layer.backward(&x, &dy);
    let once = grads(&layer);
    layer.backward(&x, &dy);
    // A value added to itself is exact.
    let twice = grads(&layer);
    for (once, twice) in once.iter().zip(&twice) {
        assert!(once.iter().zip(twice).all(|(a, b)| 2.0 * a == *b));
    }
    layer.zero_grad();
    assert!(grads(&layer).iter().flatten().all(|g| *g == 0.0));
    layer.backward(&x, &dy);
    assert_eq!(grads(&layer), once);
}

#[test]
fn a_batch_gives_the_input_gradients_of_its_vectors() {
    let (d_out, d_in, rank, batch) = (33, 192, 16, 7);
    let mut layer = layer(d_out, d_in, rank, BlockSize::B64, true);
    let (x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
    let (mut scratch, mut dx) = (BackwardScratch::new(), vec![f32::NAN; x.len()]);
    scratch.reserve(d_out, d_in, rank, batch).unwrap();
    // 33 gradients are two groups of 32, each with a scale.
    assert_eq!(scratch.memory_bytes(), (3 * batch * rank + d_out * rank) * 4 + batch * (64 * 2 + 2 * 4));
    layer.backward_into(&x, &dy, &mut scratch, Some(&mut dx)).unwrap();
    let with_dx = bits(layer.lora_a().grad().unwrap());
    for ((x, dy), dx) in x.chunks(d_in).zip(dy.chunks(d_out)).zip(dx.chunks(d_in)) {
        let mut alone = vec![f32::NAN; d_in];
        layer.backward_into(x, dy, &mut scratch, Some(&mut alone)).unwrap();
        assert_eq!(bits(&alone), bits(dx));
    }
    layer.zero_grad();
    layer.backward_into(&x, &dy, &mut scratch, None).unwrap();
    assert_eq!(bits(layer.lora_a().grad().unwrap()), with_dx);
}

#[test]
fn wrong_shapes_are_errors_and_change_no_gradient() {
    let mut layer = layer(3, 64, 2, BlockSize::B64, false);
    let tensor = |len| Tensor::zeros(len, false);
    let mut message = |x, dy| layer.try_backward(&tensor(x), &tensor(dy)).unwrap_err().to_string();
    assert_eq!(message(65, 3), "a batch of vectors of 64 values cannot have 65");
    assert_eq!(message(63, 3), "a batch of vectors of 64 values cannot have 63");
    assert_eq!(message(128, 3), "output gradient: expected length 6, got 3");
    let mut scratch = layer.backward_scratch(1);
    let (x, dy) = ([0.0; 128], [0.0; 6]);
    let got = layer.backward_into(&x[..64], &dy[..3], &mut scratch, Some(&mut [0.0; 63]));
    assert_eq!(got.unwrap_err().to_string(), "input gradient: expected length 64, got 63");
    let got = layer.backward_into(&x, &dy, &mut scratch, None);
    assert_eq!(got.unwrap_err().to_string(), "scratch for the backward: expected length 76, got 70");
    assert!(layer.lora_a().grad().is_none() && layer.lora_b().grad().is_none());
    assert_eq!(layer.backward(&tensor(0), &tensor(0)).len(), 0);
    *layer.lora_b_mut() = tensor(5);
    let got = layer.try_backward(&tensor(64), &tensor(3)).unwrap_err().to_string();
    assert_eq!(got, "lora_b: expected 3 x 2 values, got 5");
}

#[test]
fn layers_without_inputs_or_outputs_have_gradients_of_zero() {
    for (d_out, d_in) in [(0, 64), (4, 0), (0, 0)] {
        let mut layer = layer(d_out, d_in, 2, BlockSize::B64, false);
        let dx = layer.backward(&Tensor::from_vec(vec![1.0; d_in], false), &Tensor::from_vec(vec![1.0; d_out], false));
        assert_eq!(dx.data(), vec![0.0; d_in]);
        assert!(layer.trainable_params().iter().all(|p| p.grad().is_none_or(|g| g.iter().all(|g| *g == 0.0))));
    }
}

#[test]
fn a_nan_gives_the_one_nan_and_optimizers_refuse_it() {
    for k in all_kernels() {
        let mut layer = layer(5, 96, 3, BlockSize::B32, false).with_kernels(k);
        let (x, mut dy) = (Tensor::from_vec(normal(96, 1.0, 4), false), Tensor::from_vec(normal(5, 1.0, 5), false));
        dy.data_mut()[2] = -f32::NAN;
        let dx = layer.backward(&x, &dy);
        assert_eq!(bits(dx.data()), [f32::NAN.to_bits(); 96]);
        assert_eq!(bits(layer.lora_a().grad().unwrap()), [f32::NAN.to_bits(); 3 * 96]);
        let values = [layer.lora_a(), layer.lora_b()].map(|t| bits(t.data()));
        let (mut adam, mut sgd) = (AdamW::new(0.1), Sgd::new(0.1));
        for error in [adam.step(layer.trainable_params()).unwrap_err(), sgd.step(layer.trainable_params()).unwrap_err()]
        {
            assert_eq!(error.to_string(), "gradient: value 0 is NaN, which is not finite");
        }
        assert_eq!([layer.lora_a(), layer.lora_b()].map(|t| bits(t.data())), values);
        assert!(adam.state.is_empty());
    }
}

/// A tensor with a gradient.
fn param(values: &[f32], grad: &[f32]) -> Tensor {
    let mut tensor = Tensor::from_vec(values.to_vec(), true);
    tensor.accumulate_grad(grad).unwrap();
    tensor
}

#[test]
fn optimizers_follow_their_formulas() {
    let (values, gradients) = (normal(40, 0.5, 6), normal(40 * 30, 0.1, 7));
    let mut adam = AdamW { lr: 0.01, betas: [0.8, 0.99], weight_decay: 0.1, ..AdamW::new(0.0) };
    let mut sgd = Sgd { momentum: 0.7, weight_decay: 0.05, ..Sgd::new(0.02) };
    let mut plain = Sgd { weight_decay: 0.05, ..Sgd::new(0.02) };
    let mut tensors = [param(&values, &[0.0; 40]), param(&values, &[0.0; 40]), param(&values, &[0.0; 40])];
    // (p, first, second) in f64.
    let mut expected = values.iter().map(|p| [(f64::from(*p), 0.0, 0.0); 3]).collect::<Vec<_>>();
    for (t, grad) in (1..).zip(gradients.chunks(40)) {
        for tensor in &mut tensors {
            tensor.zero_grad();
            tensor.accumulate_grad(grad).unwrap();
        }
        let [a, b, c] = &mut tensors;
        adam.step([a]).unwrap();
        sgd.step([b]).unwrap();
        plain.step([c]).unwrap();
        for (i, g) in grad.iter().map(|g| f64::from(*g)).enumerate() {
            let [(p, m, v), (q, velocity, _), (r, _, _)] = &mut expected[i];
            *p *= 1.0 - 0.01 * 0.1;
            *m = 0.8 * *m + (1.0 - 0.8) * g;
            *v = 0.99 * *v + (1.0 - 0.99) * g * g;
            *p -= 0.01 / (1.0 - 0.8_f64.powi(t)) * *m / ((*v / (1.0 - 0.99_f64.powi(t))).sqrt() + 1e-8);
            *velocity = 0.7 * *velocity + (g + 0.05 * *q);
            *q -= 0.02 * *velocity;
            *r -= 0.02 * (g + 0.05 * *r);
        }
    }
    assert_eq!((adam.state.len(), adam.state[0].step, sgd.state.len(), plain.state.len()), (1, 30, 1, 0));
    for (i, e) in expected.iter().enumerate() {
        for (tensor, (p, _, _)) in tensors.iter().zip(e) {
            assert!((f64::from(tensor.data()[i]) - p).abs() < 2e-6, "value {i}: {} for {p}", tensor.data()[i]);
        }
    }
}

#[test]
fn optimizers_skip_what_has_no_gradient_and_name_what_does_not_fit() {
    let mut adam = AdamW::new(0.1);
    let (mut trained, mut bare, mut frozen) =
        (param(&[1.0, 2.0], &[1.0, 1.0]), Tensor::zeros(3, true), Tensor::zeros(4, false));
    adam.step([&mut trained, &mut bare, &mut frozen]).unwrap();
    assert!(trained.data()[0] < 1.0);
    assert_eq!((bare.data(), frozen.data()), (&[0.0; 3][..], &[0.0; 4][..]));
    assert_eq!(adam.state.iter().map(|m| m.step).collect::<Vec<_>>(), [1, 0, 0]);
    let got = adam.step([&mut trained, &mut bare]).unwrap_err();
    assert_eq!(got.to_string(), "tensors of an optimizer: expected length 3, got 2");
    let got = adam.step([&mut bare, &mut trained, &mut frozen]).unwrap_err();
    assert_eq!(got.to_string(), "tensor of an optimizer: expected length 2, got 3");
    let mut sgd = Sgd { momentum: 0.9, ..Sgd::new(0.1) };
    sgd.step([&mut trained]).unwrap();
    let got = sgd.step([&mut trained, &mut bare]).unwrap_err();
    assert_eq!(got.to_string(), "tensors of an optimizer: expected length 1, got 2");
    let before = bits(trained.data());
    let got = Sgd::new(f64::NAN).step([&mut trained]).unwrap_err();
    assert_eq!(got.to_string(), "lr, momentum, weight decay: value 0 is NaN, which is not finite");
    assert_eq!(bits(trained.data()), before);
}

#[test]
fn training_lowers_the_loss_and_only_moves_the_adapter() {
    let (d_out, d_in, rank, batch) = (24, 128, 4, 16);
    let base = Quantized4Bit::quantize(&normal(d_out * d_in, 0.02, 1), d_out, d_in, BlockSize::B64, true).unwrap();
    let packed = base.packed().to_vec();
    let adapter = LoRAAdapter::new(d_out, d_in, rank, 8.0, LoRAScaling::Standard, 3).unwrap();
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap();
    let x = Tensor::from_vec(normal(batch * d_in, 1.0, 4), false);
    let target = normal(batch * d_out, 0.5, 5);
    let mut adam = AdamW::new(0.02);
    let mut losses = Vec::new();
    for _ in 0..60 {
        let y: Vec<f32> = x
            .data()
            .chunks(d_in)
            .flat_map(|x| layer.forward(&Tensor::from_vec(x.to_vec(), false)).into_vec())
            .collect();
        let dy: Vec<f32> = y.iter().zip(&target).map(|(y, t)| 2.0 * (y - t) / target.len() as f32).collect();
        losses.push(y.iter().zip(&target).map(|(y, t)| (y - t).powi(2)).sum::<f32>() / target.len() as f32);
        layer.zero_grad();
        layer.backward(&x, &Tensor::from_vec(dy, false));
        adam.step(layer.trainable_params()).unwrap();
    }
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    assert_eq!(layer.base_weight_quantized().packed(), packed);
}
