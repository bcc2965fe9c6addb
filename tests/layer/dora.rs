//! `DoRA`: forward, gradients and merge against f64, and norms that cannot be stale in silence.

use nf4::optim::AdamW;
use nf4::{
    Adapters, Arithmetic, BlockSize, Error, LoRAAdapter, LoRALayer, LoRAScaling, MultiAdapterLayer, QLoRALayer,
    Quantized4Bit, Tensor,
};

use crate::{adapter, all_kernels, bits, layer, normal};

const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 1, 1, 1), (7, 65, 3, 4), (9, 96, 8, 5), (150, 128, 100, 3), (4, 70, 130, 9)];

/// A `DoRA` adapter whose magnitude is 20 % or so off the norms.
fn dora(d_out: usize, d_in: usize, rank: usize) -> LoRAAdapter {
    let magnitude = normal(d_out, 0.1, 8).iter().map(|m| 0.5 + m).collect();
    adapter(d_out, d_in, rank).with_magnitude(magnitude).unwrap()
}

fn dora_layer(d_out: usize, d_in: usize, rank: usize) -> QLoRALayer {
    let base = layer(d_out, d_in, rank, BlockSize::B64, true).into_parts().0;
    QLoRALayer::from_parts(base, dora(d_out, d_in, rank)).unwrap().with_arithmetic(Arithmetic::F32)
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_vec(values.to_vec(), false)
}

/// The formulas in f64 on a weight `[d_out, d_in]`.
struct Exact {
    /// `W + scale * B A`.
    adapted: Vec<f64>,
    norms: Vec<f64>,
    magnitude: Vec<f64>,
    scale: f64,
    d_in: usize,
}

impl Exact {
    fn new(weight: &[f32], adapter: &LoRAAdapter) -> Self {
        let (d_in, rank, scale) = (adapter.d_in(), adapter.rank(), f64::from(adapter.scale()));
        let (a, b) = (adapter.a().data(), adapter.b().data());
        let delta = |i: usize| -> f64 {
            let (row, column) = (i / d_in, i % d_in);
            (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * d_in + column])).sum()
        };
        let adapted: Vec<f64> = weight.iter().enumerate().map(|(i, w)| f64::from(*w) + scale * delta(i)).collect();
        let norms = adapted.chunks(d_in).map(|row| row.iter().map(|w| w * w).sum::<f64>().sqrt()).collect();
        let magnitude = adapter.magnitude().unwrap().data().iter().map(|m| f64::from(*m)).collect();
        Self { adapted, norms, magnitude, scale, d_in }
    }

    fn merged(&self) -> Vec<f64> {
        let gain = |row: usize| self.magnitude[row] / self.norms[row];
        self.adapted.iter().enumerate().map(|(i, w)| gain(i / self.d_in) * w).collect()
    }

    fn forward(&self, x: &[f32]) -> Vec<f64> {
        let dot = |row: &[f64], x: &[f32]| row.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>();
        let merged = self.merged();
        x.chunks(self.d_in).flat_map(|x| merged.chunks(self.d_in).map(|row| dot(row, x)).collect::<Vec<_>>()).collect()
    }
}

/// The largest difference as a fraction of the largest value. All sums here have fewer than 1000 terms of like size,
/// so 2e-6, 33 roundings of f32, is what a wrong formula exceeds by far and right arithmetic does not.
fn check(name: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(0.0_f64, |m, e| m.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*g) - e).abs() <= 2e-6 * largest, "{name}: value {i}: {g} for {e}, largest {largest}");
    }
}

#[test]
fn forward_and_merge_are_near_f64_with_the_same_bits_on_every_instruction_set() {
    let kernels = all_kernels();
    for (d_out, d_in, rank, batch) in SHAPES {
        let name = format!("{d_out}x{d_in}, rank {rank}");
        let x = normal(batch * d_in, 1.0, 4);
        let fresh = dora_layer(d_out, d_in, rank);
        let exact = Exact::new(&fresh.base_weight_quantized().dequantize(), fresh.adapter());
        let y = fresh.forward(&tensor(&x));
        check(&name, y.data(), &exact.forward(&x));
        check(&format!("{name}, merged"), &fresh.merge_to_f32(), &exact.merged());
        let sixteen = fresh.clone().with_arithmetic(Arithmetic::SixteenByFour);
        for k in &kernels {
            let other = fresh.clone().with_kernels(*k);
            assert_eq!(bits(other.forward(&tensor(&x)).data()), bits(y.data()), "{name}, {}", k.isa());
            for (x, y) in x.chunks(d_in).zip(y.data().chunks(d_out)) {
                assert_eq!(bits(other.forward(&tensor(x)).data()), bits(y), "{name}, {}", k.isa());
                let [a, b] = [&sixteen, &sixteen.clone().with_kernels(*k)].map(|l| bits(l.forward(&tensor(x)).data()));
                assert_eq!(a, b, "{name}, {}", k.isa());
            }
        }

        let weight = normal(d_out * d_in, 0.02, 1);
        let mut dense = LoRALayer::from_parts(tensor(&weight), dora(d_out, d_in, rank)).unwrap();
        let exact = Exact::new(&weight, dense.adapter());
        let expected = exact.forward(&x);
        for (x, y) in x.chunks(d_in).zip(expected.chunks(d_out)) {
            check(&format!("{name}, dense"), dense.forward(&tensor(x)).data(), y);
        }
        dense.merge();
        check(&format!("{name}, dense, merged"), dense.base_weight().data(), &exact.merged());
    }
}

#[test]
fn gradients_agree_with_differences_that_keep_the_norms() {
    for (d_out, d_in, rank, batch) in SHAPES {
        let (x, dy) = (normal(batch * d_in, 1.0, 4), normal(batch * d_out, 1.0, 5));
        let mut layer = dora_layer(d_out, d_in, rank);
        let dx = layer.backward(&tensor(&x), &tensor(&dy));
        let exact = Exact::new(&layer.base_weight_quantized().dequantize(), layer.adapter());
        let (a, b) = (layer.lora_a().data(), layer.lora_b().data());
        let [value_a, value_b] = [a, b].map(|m| m.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        // The objective, sum of dy * y, is linear in each single value while norms are kept: its gradient by the
        // matrix is `gain dy^T x`, and the chain rule gives the rest.
        let gain = |row: usize| exact.magnitude[row] / exact.norms[row];
        let by_weight: Vec<f64> = (0..d_out * d_in)
            .map(|i| {
                let (row, column) = (i / d_in, i % d_in);
                let sum: f64 =
                    (0..batch).map(|n| f64::from(dy[n * d_out + row]) * f64::from(x[n * d_in + column])).sum();
                gain(row) * sum
            })
            .collect();
        let da: Vec<f64> = (0..rank * d_in)
            .map(|i| {
                let (k, column) = (i / d_in, i % d_in);
                let sum: f64 = (0..d_out).map(|o| value_b[o * rank + k] * by_weight[o * d_in + column]).sum();
                exact.scale * sum
            })
            .collect();
        let db: Vec<f64> = (0..d_out * rank)
            .map(|i| {
                let (o, k) = (i / rank, i % rank);
                let sum: f64 = (0..d_in).map(|c| by_weight[o * d_in + c] * value_a[k * d_in + c]).sum();
                exact.scale * sum
            })
            .collect();
        let merged = exact.merged();
        let expected_dx: Vec<f64> = (0..batch * d_in)
            .map(|i| {
                let (n, column) = (i / d_in, i % d_in);
                (0..d_out).map(|o| f64::from(dy[n * d_out + o]) * merged[o * d_in + column]).sum()
            })
            .collect();
        let dm: Vec<f64> = (0..d_out)
            .map(|o| {
                let row = &exact.adapted[o * d_in..][..d_in];
                let by_row = &by_weight[o * d_in..][..d_in];
                row.iter().zip(by_row).map(|(v, g)| v * g).sum::<f64>() / exact.magnitude[o]
            })
            .collect();
        let name = format!("{d_out}x{d_in}, rank {rank}");
        check(&format!("{name}: dA"), layer.lora_a().grad().unwrap(), &da);
        check(&format!("{name}: dB"), layer.lora_b().grad().unwrap(), &db);
        check(&format!("{name}: dx"), dx.data(), &expected_dx);
        check(&format!("{name}: dm"), layer.adapter().magnitude().unwrap().grad().unwrap(), &dm);
    }
}

#[test]
fn a_fresh_adapter_with_dora_changes_nothing() {
    let (d_out, d_in) = (64, 128);
    let base = Quantized4Bit::quantize(&normal(d_out * d_in, 0.02, 1), d_out, d_in, BlockSize::B64, false).unwrap();
    let init = LoRAAdapter::new(d_out, d_in, 4, 8.0, LoRAScaling::Standard, 1).unwrap();
    let plain = QLoRALayer::from_parts(base.clone(), init.clone()).unwrap();
    let unjoined = init.with_dora();
    assert!(unjoined.is_dora() && unjoined.magnitude().is_none());
    let mut layer = QLoRALayer::from_parts(base, unjoined).unwrap();
    let norms: Vec<f64> = layer.base_weight_quantized().dequantize::<f32>().chunks(d_in).map(norm).collect();
    check("magnitude", layer.adapter().magnitude().unwrap().data(), &norms);
    let x = tensor(&normal(d_in, 1.0, 4));
    let (y, expected) = (layer.forward(&x), plain.forward(&x));
    // A norm is rounded to f32, and divided by itself.
    assert_eq!(bits(y.data()), bits(expected.data()));
    // The same once the magnitude is there: after the adapter was stored, or was moved.
    let (base, _, adapter) = layer.clone().into_parts();
    let again = QLoRALayer::from_parts(base, adapter).unwrap();
    assert_eq!(bits(again.forward(&x).data()), bits(expected.data()));
    assert_eq!(bits(&layer.merge_to_f32()), bits(&plain.merge_to_f32()));
    assert_eq!(layer.trainable_params().iter().map(|p| p.len()).collect::<Vec<_>>(), [4 * d_in, 4 * d_out, d_out]);
    let extra = layer.memory_stats().lora_bytes - plain.memory_stats().lora_bytes;
    assert_eq!(extra, 3 * 4 * d_out);
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn stale_norms_are_an_error_until_they_are_taken_again() {
    let change: [fn(&mut QLoRALayer); 4] = [
        |l| l.lora_a_mut().data_mut()[3] = 1.0,
        |l| l.lora_b_mut().data_mut()[3] = 1.0,
        |l| l.adapter_mut().magnitude_mut().unwrap().data_mut()[3] = 1.0,
        |l| l.trainable_params()[1].data_mut()[2] = 0.5,
    ];
    let x = tensor(&normal(96, 1.0, 4));
    for change in change {
        let mut layer = dora_layer(9, 96, 8);
        let before = layer.forward(&x);
        change(&mut layer);
        let error = layer.try_forward(&x).unwrap_err();
        assert_eq!(error, Error::StaleNorms);
        assert_eq!(
            error.to_string(),
            "the norms of a DoRA adapter are stale: call refresh_dora after changing the adapter"
        );
        assert_eq!(layer.try_forward(&x).unwrap_err(), Error::StaleNorms);
        // A merge takes norms of its own; a backward may take them again, and does.
        let exact = Exact::new(&layer.base_weight_quantized().dequantize(), layer.adapter());
        check("merge", &layer.merge_to_f32(), &exact.merged());
        let mut refreshed = layer.clone();
        refreshed.refresh_dora().unwrap();
        check("forward", refreshed.forward(&x).data(), &exact.forward(x.data()));
        layer.backward(&x, &Tensor::zeros(9, false));
        assert_eq!(bits(layer.forward(&x).data()), bits(refreshed.forward(&x).data()));
        assert_ne!(bits(layer.forward(&x).data()), bits(before.data()));
    }
    let mut layer = dora_layer(9, 96, 8);
    layer.zero_grad();
    assert!(layer.try_forward(&x).is_ok(), "zero_grad changes no norm");
}

#[test]
fn an_adapter_that_moves_to_another_base_takes_its_norms_there() {
    let (d_out, d_in) = (9, 96);
    let (_, _, moved) = dora_layer(d_out, d_in, 8).into_parts();
    let base = Quantized4Bit::quantize(&normal(d_out * d_in, 0.1, 77), d_out, d_in, BlockSize::B32, false).unwrap();
    let layer = QLoRALayer::from_parts(base, moved).unwrap().with_arithmetic(Arithmetic::F32);
    let exact = Exact::new(&layer.base_weight_quantized().dequantize(), layer.adapter());
    let x = normal(d_in, 1.0, 4);
    check("forward", layer.forward(&tensor(&x)).data(), &exact.forward(&x));
}

#[test]
fn dora_among_other_adapters() {
    let (d_out, d_in) = (150, 128);
    let single = dora_layer(d_out, d_in, 8);
    let plain = layer(d_out, d_in, 3, BlockSize::B64, true).with_arithmetic(Arithmetic::F32);
    let (base, ..) = single.clone().into_parts();
    let mut many = MultiAdapterLayer::new(base).with_arithmetic(Arithmetic::F32);
    let dora = many.add("dora", dora(d_out, d_in, 8)).unwrap();
    let plain_id = many.add("plain", adapter(d_out, d_in, 3)).unwrap();
    let x = tensor(&normal(3 * d_in, 1.0, 4));
    let none = many.forward(&x, Adapters::Active);
    let each = many.forward(&x, Adapters::PerVector(&[Some(dora), None, Some(plain_id)]));
    let (of_single, of_plain) = (single.forward(&x), plain.forward(&x));
    let row = |t: &Tensor, n: usize| bits(&t.data()[n * d_out..][..d_out]);
    assert_eq!(row(&each, 0), row(&of_single, 0));
    assert_eq!(row(&each, 1), row(&none, 1));
    assert_eq!(row(&each, 2), row(&of_plain, 2));
    // Together each adds what it adds alone, times its weight.
    many.set_active(&["dora", "plain"]).unwrap();
    many.set_adapter_weight("dora", 0.25).unwrap();
    let both = many.forward(&x, Adapters::Active);
    let expected: Vec<f64> = none
        .data()
        .iter()
        .zip(of_single.data())
        .zip(of_plain.data())
        .map(|((n, s), p)| {
            let [n, s, p] = [n, s, p].map(|v| f64::from(*v));
            n + 0.25 * (s - n) + (p - n)
        })
        .collect();
    check("both", both.data(), &expected);
}

#[test]
fn rows_of_zeros_stay_zero() {
    let adapter = LoRAAdapter::new(2, 64, 2, 2.0, LoRAScaling::Standard, 0).unwrap().with_dora();
    let mut weight = normal(128, 0.02, 1);
    weight[64..].fill(0.0);
    let base = Quantized4Bit::quantize(&weight, 2, 64, BlockSize::B64, false).unwrap();
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap();
    let x = tensor(&normal(64, 1.0, 4));
    assert_eq!(layer.forward(&x).data()[1], 0.0);
    layer.backward(&x, &tensor(&[1.0, 1.0]));
    assert!(layer.trainable_params().iter().all(|p| p.grad().unwrap().iter().all(|g| g.is_finite())));
    assert!(layer.merge_to_f32()[64..].iter().all(|w| *w == 0.0));
}

#[test]
fn dora_trains() {
    let mut layer = dora_layer(9, 96, 4);
    let (x, target) = (tensor(&normal(8 * 96, 1.0, 4)), normal(8 * 9, 0.5, 5));
    let mut adam = AdamW::new(0.02);
    let mut losses = Vec::new();
    for _ in 0..40 {
        let y = layer.forward(&x);
        losses.push(y.data().iter().zip(&target).map(|(y, t)| (y - t).powi(2)).sum::<f32>());
        let dy: Vec<f32> = y.data().iter().zip(&target).map(|(y, t)| (y - t) / 36.0).collect();
        layer.zero_grad();
        layer.backward(&x, &tensor(&dy));
        adam.step(layer.trainable_params()).unwrap();
        layer.refresh_dora().unwrap();
    }
    assert!(losses[39] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn wrong_magnitudes_are_errors() {
    let got = adapter(3, 64, 2).with_magnitude(vec![1.0; 2]).unwrap_err();
    assert_eq!(got.to_string(), "lora_magnitude_vector: expected length 3, got 2");
    let got = adapter(3, 64, 2).with_magnitude(vec![1.0, f32::NAN, 1.0]).unwrap_err();
    assert_eq!(got.to_string(), "lora_magnitude_vector: value 1 is NaN, which is not finite");
    let mut layer = dora_layer(3, 64, 2);
    *layer.adapter_mut().magnitude_mut().unwrap() = Tensor::zeros(4, true);
    for got in [layer.refresh_dora(), layer.try_forward(&Tensor::zeros(64, false)).map(drop)] {
        assert_eq!(got.unwrap_err().to_string(), "lora_magnitude_vector: expected length 3, got 4");
    }
}
