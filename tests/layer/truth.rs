//! What a forward must give, in f64, and how far it may lie from that.

#[allow(dead_code, reason = "every test program uses a part of this")]
#[path = "../support/truth.rs"]
pub(crate) mod products;

use nf4::{Activations, Activations8x8, Arithmetic, Kernels, LoRAAdapter, QLoRALayer};
use products::{Row, Truth};

/// The unit roundoff of f32.
pub(crate) const EPS: f64 = 1.0 / 16_777_216.0;

/// An exact output and the largest error that rounding can give it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Output {
    pub(crate) exact: f64,
    pub(crate) bound: f64,
}

/// `y = W x + scale * B (A x) + bias` with the dequantized `W`.
pub(crate) fn forward(layer: &QLoRALayer, x: &[f32]) -> Vec<Output> {
    let mut y = base_product(layer, x);
    add_adapter(layer.adapter(), x, &mut y);
    for (y, b) in y.iter_mut().zip(layer.bias().unwrap_or_default()) {
        y.exact += f64::from(*b);
        y.bound += EPS * (y.exact.abs() + y.bound);
    }
    y
}

impl From<Truth> for Output {
    fn from(truth: Truth) -> Self {
        Self { exact: truth.value, bound: truth.bound }
    }
}

/// `W x` in the arithmetic of the layer where it applies: 16x4 if blocks are aligned with rows, 8x8 if rows are whole
/// groups. Otherwise in f32.
fn base_product(layer: &QLoRALayer, x: &[f32]) -> Vec<Output> {
    let base = layer.base_weight_quantized();
    let (view, block_size) = (base.view(), base.block_size());
    let mut values = vec![0; Activations::values_len(x.len(), block_size)];
    let mut scales = vec![0.0; Activations::scales_len(x.len(), block_size)];
    let activations = Kernels::scalar().quantize_activations(x, block_size, &mut values, &mut scales).unwrap();
    let mut bytes = vec![0; Activations8x8::values_len(x.len())];
    let mut byte_scales = vec![0.0; Activations8x8::scales_len(x.len())];
    let activations_8x8 = Kernels::scalar().quantize_activations_8x8(x, &mut bytes, &mut byte_scales).unwrap();
    let product = |row: Row| match layer.arithmetic() {
        Arithmetic::SixteenByFour if view.is_row_aligned() => row.sixteen_by_four(&activations),
        Arithmetic::EightByEight if x.len().is_multiple_of(32) => row.eight_by_eight(&activations_8x8),
        _ => row.f32(x),
    };
    (0..base.rows()).map(|r| product(Row::of(&view, base.packed(), r)).into()).collect()
}

/// Adds `scale * B (A x)`: the dense products, then one rounding of the product with the scale, and one of the sum.
pub(crate) fn add_adapter(adapter: &LoRAAdapter, x: &[f32], y: &mut [Output]) {
    let low_rank: Vec<Truth> = adapter.a().data().chunks(x.len().max(1)).map(|a| products::dense(a, x)).collect();
    let scale = f64::from(adapter.scale());
    for (y, b) in y.iter_mut().zip(adapter.b().data().chunks(adapter.rank())) {
        let Truth { value, bound } = products::dense_of(b, &low_rank);
        y.exact += scale * value;
        y.bound += scale.abs() * (bound + EPS * (value.abs() + bound));
        y.bound += EPS * (y.exact.abs() + y.bound);
    }
}

/// Fails if an output lies further from the truth than rounding allows.
pub(crate) fn check(name: &str, expected: &[Output], got: &[f32]) {
    assert_eq!(expected.len(), got.len(), "{name}");
    for (row, (e, y)) in expected.iter().zip(got).enumerate() {
        let error = (f64::from(*y) - e.exact).abs();
        // Products of roundings, (1 + EPS)^n - 1 against n EPS, are below a thousandth of the bound.
        assert!(error <= e.bound * 1.001, "{name}: row {row}: got {y}, exact {}, off {error} > {}", e.exact, e.bound);
    }
}
