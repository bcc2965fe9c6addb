//! A layer as dense arithmetic in f64, and how far f32 may be from it.
//!
//! Values are of about 1, so nothing overflows or underflows. A sum of products that are each rounded `r` times is off by at
//! most `γ(r)` times the sum of their magnitudes, with `γ(r) = r u / (1 - r u)`, `u = 2^-24`.

use nf4::optim::Moments;
use nf4::{LoRAAdapter, LoRAScaling, QLoRALayer, Tensor};

use crate::layer_truth::{self, EPS, Output, add_adapter, check};

fn gamma(roundings: usize) -> f64 {
    let ru = roundings as f64 * EPS;
    ru / (1.0 - ru)
}

/// Roundings of a term in a sum of `n` rows: the product, the four, the fours of a chunk, the chunks.
fn rows(n: usize) -> usize {
    4 + n.min(512).div_ceil(4) + n.div_ceil(512)
}

/// Roundings of a term in a dense product of `n` columns: the product, the lane, the lanes.
fn dense(n: usize) -> usize {
    5 + n / 8
}

/// `W`, `A`, `B`, the scale and the gains of the rows, all f64 and exact but for the gains, whose f64 rounding does not count
/// beside that of f32.
struct Dense {
    d_out: usize,
    d_in: usize,
    rank: usize,
    w: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    scale: f64,
    gains: Vec<f64>,
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

impl Dense {
    fn new(layer: &QLoRALayer) -> Self {
        let (d_out, d_in, rank) = (layer.d_out(), layer.d_in(), layer.rank());
        let w = wide(&layer.base_weight_quantized().dequantize::<f32>());
        let (a, b) = (wide(layer.lora_a().data()), wide(layer.lora_b().data()));
        let mut model = Self { d_out, d_in, rank, w, a, b, scale: layer.scale().into(), gains: vec![1.0; d_out] };
        if let Some(magnitude) = layer.adapter().magnitude() {
            for row in 0..d_out {
                let norm = (0..d_in).map(|c| model.adapted(row, c).0.powi(2)).sum::<f64>().sqrt();
                model.gains[row] = if norm == 0.0 { 0.0 } else { f64::from(magnitude.data()[row]) / norm };
            }
        }
        model
    }

    /// `w + scale * b A` of a place, and the sum of the magnitudes.
    fn adapted(&self, row: usize, column: usize) -> (f64, f64) {
        let w = self.w[row * self.d_in + column];
        let term = |k: usize| self.scale * self.b[row * self.rank + k] * self.a[k * self.d_in + column];
        (w + (0..self.rank).map(term).sum::<f64>(), w.abs() + (0..self.rank).map(|k| term(k).abs()).sum::<f64>())
    }
}

/// Checks a merged weight: f64 in any order, rounded once.
pub(super) fn check_merged(layer: &QLoRALayer, got: &[f32]) {
    let model = Dense::new(layer);
    let weight = |i: usize| {
        let (row, column) = (i / model.d_in, i % model.d_in);
        let ((exact, magnitude), gain) = (model.adapted(row, column), model.gains[row]);
        // Two roundings: of the norm that the gain comes from, and of the weight.
        Output { exact: gain * exact, bound: gain.abs() * (gamma(2) * exact.abs() + 1e-13 * magnitude) }
    };
    let expected: Vec<Output> = (0..model.d_out * model.d_in).map(weight).collect();
    check("merged weight", &expected, got);
}

/// Checks the forward of one vector. `plain` is the same layer without `DoRA`, bias and what the adapter adds.
pub(super) fn check_forward(layer: &QLoRALayer, plain: &QLoRALayer, x: &[f32], got: &[f32]) {
    let gains = Dense::new(layer).gains;
    let mut y = layer_truth::forward(plain, x);
    if layer.adapter().magnitude().is_none() {
        add_adapter(layer.adapter(), x, &mut y);
    } else {
        let base = y.clone();
        add_adapter(layer.adapter(), x, &mut y);
        for ((y, base), gain) in y.iter_mut().zip(base).zip(gains) {
            // Both parts are multiplied by the gain alone, which is rounded, and whose norm is: four roundings each beyond
            // those of `y`.
            let parts = base.exact.abs() + (y.exact - base.exact).abs() + base.bound + y.bound;
            *y = Output { exact: gain * y.exact, bound: gain.abs() * (y.bound + gamma(4) * parts) };
        }
    }
    for (y, b) in y.iter_mut().zip(layer.bias().unwrap_or_default()) {
        y.exact += f64::from(*b);
        y.bound += EPS * (y.exact.abs() + y.bound);
    }
    check("forward", &y, got);
}

/// Checks the gradients of `A`, `B` and the inputs that a backward gives; `layer` is as it was before, with gradients of
/// `A` and `B` that the new ones are added to.
pub(super) fn check_gradients(layer: &QLoRALayer, x: &[f32], dy: &[f32], got: [&[f32]; 3]) {
    let model = Dense::new(layer);
    let Dense { d_out, d_in, rank, scale, .. } = model;
    let batch = x.len().checked_div(d_in).unwrap_or(0);
    let (x, dy) = (wide(x), wide(dy));
    // With `DoRA`, `dy` is multiplied by the gain, which is rounded, and whose norm is.
    let dy: Vec<f64> = dy.iter().enumerate().map(|(i, dy)| dy * model.gains[i % d_out]).collect();
    let dora = if layer.adapter().magnitude().is_some() { 3 } else { 0 };
    // A sum of the given terms of exact factors, each rounded so often, on top of an old value.
    let sum = |old: f64, roundings: usize, terms: &mut dyn Iterator<Item = (f64, f64)>| {
        let (exact, magnitude) = terms.fold((old, old.abs()), |(e, m), (term, of)| (e + term, m + of));
        Output { exact, bound: gamma(roundings) * magnitude }
    };
    // The sum of products of two factors, and the sum of its magnitudes.
    let product = |n: usize, term: &dyn Fn(usize) -> f64| {
        (0..n).map(term).fold((0.0, 0.0), |(e, m), term| (e + scale * term, m + (scale * term).abs()))
    };
    let u = |n: usize, k: usize| product(d_in, &|i| x[n * d_in + i] * model.a[k * d_in + i]);
    let v = |n: usize, k: usize| product(d_out, &|r| dy[n * d_out + r] * model.b[r * rank + k]);
    let (u, v): (Vec<_>, Vec<_>) = (0..batch * rank).map(|i| (u(i / rank, i % rank), v(i / rank, i % rank))).unzip();
    let scaled = |(e, m): (f64, f64), f: f64| (e * f, m * f.abs());

    let old = |tensor: &Tensor, i: usize| tensor.grad().map_or(0.0, |grad| f64::from(grad[i]));
    let a = |i: usize| {
        let (k, c) = (i / d_in, i % d_in);
        let roundings = dora + rows(d_out) + 1 + rows(batch);
        sum(old(layer.lora_a(), i), roundings, &mut (0..batch).map(|n| scaled(v[n * rank + k], x[n * d_in + c])))
    };
    let b = |i: usize| {
        let (r, k) = (i / rank, i % rank);
        let roundings = dora + dense(d_in) + 1 + rows(batch);
        sum(old(layer.lora_b(), i), roundings, &mut (0..batch).map(|n| scaled(u[n * rank + k], dy[n * d_out + r])))
    };
    let dx = |i: usize| {
        let (n, c) = (i / d_in, i % d_in);
        let through_base =
            |r: usize| (model.w[r * d_in + c] * dy[n * d_out + r], (model.w[r * d_in + c] * dy[n * d_out + r]).abs());
        let through_adapter = (0..rank).map(|k| scaled(v[n * rank + k], model.a[k * d_in + c]));
        let roundings = dora + rows(d_out) + 2 + rows(rank);
        sum(0.0, roundings, &mut (0..d_out).map(through_base).chain(through_adapter))
    };
    check("gradient of A", &(0..rank * d_in).map(a).collect::<Vec<_>>(), got[0]);
    check("gradient of B", &(0..d_out * rank).map(b).collect::<Vec<_>>(), got[1]);
    check("gradient of the input", &(0..batch * d_in).map(dx).collect::<Vec<_>>(), got[2]);
}

/// Checks a step of `Sgd` without momentum and weight decay.
pub(super) fn check_sgd(before: &[f32], grad: &[f32], lr: f64, after: &[f32]) {
    let step = |(p, g): (&f32, &f32)| {
        let (p, change) = (f64::from(*p), lr * f64::from(*g));
        // The rate, the product and the difference are rounded.
        Output { exact: p - change, bound: gamma(3) * (p.abs() + change.abs()) + f64::from(f32::MIN_POSITIVE) }
    };
    check("SGD", &before.iter().zip(grad).map(step).collect::<Vec<_>>(), after);
}

/// Checks a step of `AdamW`, with its defaults and the state before and after it.
pub(super) fn check_adamw(before: &[f32], grad: &[f32], lr: f64, [old, new]: [&Moments; 2], after: &[f32]) {
    let (t, tiny) = (f64::from(new.step), f64::from(f32::MIN_POSITIVE));
    assert_eq!(new.step, old.step + 1);
    let (mut first, mut second, mut value) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..before.len() {
        let [p, g, m, v] = [before[i], grad[i], old.first[i], old.second[i]].map(f64::from);
        // Each takes at most four roundings.
        first.push(Output { exact: m + 0.1 * (g - m), bound: gamma(4) * (m.abs() + g.abs()) + tiny });
        second.push(Output { exact: 0.999 * v + 0.001 * g * g, bound: gamma(4) * (v + g * g) + tiny });
        // From the new moments, which were checked.
        let [m, v] = [new.first[i], new.second[i]].map(f64::from);
        let divisor = v.sqrt() / (1.0 - 0.999_f64.powf(t)).sqrt() + 1e-8;
        let change = lr / (1.0 - 0.9_f64.powf(t)) * m / divisor;
        let bound = gamma(4) * p.abs() + gamma(12) * change.abs() + tiny;
        value.push(Output { exact: p * (1.0 - lr * 0.01) - change, bound });
    }
    check("first moment", &first, &new.first);
    check("second moment", &second, &new.second);
    check("AdamW", &value, after);
}

/// Whether the bounds hold: everything is finite and of a size whose products neither overflow nor underflow in f32.
pub(super) fn is_tame(values: &[f32]) -> bool {
    values.iter().all(|v| *v == 0.0 || (1e-9..1e6).contains(&v.abs()))
}

/// The same `A` and `B` with another scale, without `DoRA`.
pub(super) fn with_scale(old: &LoRAAdapter, alpha: f64, scaling: LoRAScaling) -> LoRAAdapter {
    let (a, b) = (old.a().data().to_vec(), old.b().data().to_vec());
    LoRAAdapter::from_parts(a, b, old.d_out(), old.d_in(), old.rank(), alpha, scaling)
        .expect("finite, and of the same shape")
}
