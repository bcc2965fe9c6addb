//! What a forward must give, in f64, and how far it may lie from that.

use nf4::{Arithmetic, LoRAAdapter, QLoRALayer};

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

/// `W x`, by 16x4 if blocks are aligned with rows and that arithmetic was not turned off, and in f32 otherwise.
///
/// 16x4 replaces an input `x` of a group with largest magnitude `m` by `q * s`, `s = m / 8191`. `q` is `x / s` rounded
/// to an integer, where `x / s` has two roundings and is at most 8191, so it is off by at most `0.5 + 8191 * 2 EPS <
/// 0.502`. It replaces a codebook entry by a multiple of 1/32767, off by at most half of that. So with `w = C * absmax`
///
/// `|error| <= sum |w| 0.502 s + absmax (0.5 / 32767) (|x| + 0.502 s)`, and rounding of f32 on top: the integer sum,
/// the scale, `absmax * scale`, their product, one addition a group, three for the lanes, `1 / 32767` and the product
/// with it, and `w` itself: `groups + 10` roundings of terms whose magnitudes add up to at most `sum (|w| + absmax 0.5
/// / 32767) (|x| + s)`.
///
/// The f32 product rounds `C * x`, up to 8 additions of a lane in a segment, the product with absmax, one addition for
/// each segment (at most `cols / 32 + 2` groups, each cut at most once by a block), three for the lanes, and `w`.
fn base_product(layer: &QLoRALayer, x: &[f32]) -> Vec<Output> {
    let base = layer.base_weight_quantized();
    let (view, block, cols) = (base.view(), base.block_size().get(), base.cols());
    let group = base.block_size().group();
    let sixteen_by_four = view.is_row_aligned() && layer.arithmetic() == Arithmetic::SixteenByFour;
    let weights = base.dequantize::<f32>();
    let step: Vec<f64> = x
        .chunks(group)
        .flat_map(|g| {
            let largest = g.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
            core::iter::repeat_n(largest / 8191.0, g.len())
        })
        .collect();
    (0..base.rows())
        .map(|row| {
            let (mut exact, mut quantization, mut magnitude) = (0.0, 0.0, 0.0);
            for (column, (x, s)) in x.iter().zip(&step).enumerate() {
                let index = row * cols + column;
                let (w, x) = (f64::from(weights[index]), f64::from(*x));
                exact += w * x;
                if sixteen_by_four {
                    let off = f64::from(view.absmax().get(index / block)).abs() * 0.5 / 32767.0;
                    quantization += w.abs() * 0.502 * s + off * (x.abs() + 0.502 * s);
                    magnitude += (w.abs() + off) * (x.abs() + s);
                } else {
                    magnitude += w.abs() * x.abs();
                }
            }
            let roundings = if sixteen_by_four { cols / group + 10 } else { 2 * (cols / 32 + 2) + 14 };
            Output { exact, bound: quantization + roundings as f64 * EPS * magnitude }
        })
        .collect()
}

/// Adds `scale * B (A x)`. A dense product of `n` terms in 8 lanes makes, for each term, one rounding of the product
/// and at most `n / 8 + 1` additions to the lane and 3 of lanes; then come the product with the scale and the last sum.
pub(crate) fn add_adapter(adapter: &LoRAAdapter, x: &[f32], y: &mut [Output]) {
    let roundings = |n: usize| (n / 8 + 5) as f64 * EPS;
    let low_rank: Vec<Output> = adapter
        .a()
        .data()
        .chunks(x.len().max(1))
        .map(|a| {
            let terms = || a.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x));
            let magnitude: f64 = terms().map(f64::abs).sum();
            Output { exact: terms().sum(), bound: roundings(x.len()) * magnitude }
        })
        .collect();
    let scale = f64::from(adapter.scale());
    for (y, b) in y.iter_mut().zip(adapter.b().data().chunks(adapter.rank())) {
        let (mut exact, mut bound) = (0.0, 0.0);
        for (b, u) in b.iter().map(|b| f64::from(*b)).zip(&low_rank) {
            exact += b * u.exact;
            bound += b.abs() * (u.bound + roundings(adapter.rank()) * (u.exact.abs() + u.bound));
        }
        y.exact += scale * exact;
        y.bound += scale.abs() * (bound + EPS * (exact.abs() + bound));
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
