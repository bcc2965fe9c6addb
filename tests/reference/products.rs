//! The products against float64 results.

use nf4::{ACTIVATION_MAX, Activations, Kernels};

use crate::support::{Checker, Quantized, Tensor};

/// Both products of every row of `x` with a layer against `y64 = x W^T + bias`, computed in float64 from the f32
/// weights.
pub(crate) fn check(c: &mut Checker, name: &str, layer: &Quantized, x: &Tensor, bias: Option<&[f32]>, y64: &Tensor) {
    let (inputs, expected) = (x.values::<f32>(), y64.values::<f64>());
    let tolerance = f32_tolerance(layer.cols) * largest(&expected);
    let bounds = SixteenByFour::new(layer);
    c.holds(name, x.matrix_shape().1 == layer.cols && y64.matrix_shape().1 == layer.rows, || {
        format!("x {:?} and y64 {:?} do not fit {} x {}", x.shape, y64.shape, layer.rows, layer.cols)
    });
    for (n, (x, expected)) in inputs.chunks(layer.cols).zip(expected.chunks(layer.rows)).enumerate() {
        let name = format!("{name}, row {n}");
        let (plain, quantized) = (gemv_f32(c.kernels, layer, x), gemv(c.kernels, layer, x));
        c.within(&name, "f32 product", &with_bias(&plain, bias), expected, |_| tolerance);
        c.identical(&format!("{name}, f32 product, against scalar"), &plain, &gemv_f32(Kernels::scalar(), layer, x));
        c.identical(&format!("{name}, 16x4 product, against scalar"), &quantized, &gemv(Kernels::scalar(), layer, x));
        if layer.matrix().is_row_aligned() {
            let bounds = bounds.for_input(layer, x);
            c.within(&name, "16x4 product", &with_bias(&quantized, bias), expected, |row| bounds[row]);
        } else {
            c.identical(&format!("{name}, 16x4 product of straddling blocks"), &quantized, &plain);
        }
    }
}

/// The largest error of an f32 product as a fraction of the largest output: what plain f32 sums of the same data were
/// seen to have, times five or more, fixed before this library was run.
pub(crate) fn f32_tolerance(inner: usize) -> f64 {
    if inner <= 200 { 2e-6 } else { 5e-6 }
}

/// The largest magnitude.
pub(crate) fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |m, y| m.max(y.abs()))
}

fn gemv_f32(kernels: Kernels, layer: &Quantized, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; layer.rows];
    kernels.gemv_f32(&layer.matrix(), x, &mut out).unwrap();
    out
}

fn gemv(kernels: Kernels, layer: &Quantized, x: &[f32]) -> Vec<f32> {
    let mut values = vec![0; Activations::values_len(x.len(), layer.block_size)];
    let mut scales = vec![0.0; Activations::scales_len(x.len(), layer.block_size)];
    let activations = kernels.quantize_activations(x, layer.block_size, &mut values, &mut scales).unwrap();
    let mut out = vec![f32::NAN; layer.rows];
    kernels.gemv(&layer.matrix(), &activations, &mut out).unwrap();
    out
}

fn with_bias(y: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let bias = |row: usize| bias.map_or(0.0, |b| f64::from(b[row]));
    y.iter().enumerate().map(|(row, y)| f64::from(*y) + bias(row)).collect()
}

/// What the 16x4 product may differ by from the exact product with the f32 weights.
///
/// It replaces an input `x` by `s q`, with `s` the largest input of its group divided by 8191, and a weight `a C` by
/// `a K / 32767`, with `a` the block's absmax. `q` and `K` are integers, so `|x - s q| <= s / 2` and
/// `|C - K / 32767| <= 1 / 65534`. A product is then off by at most `|a C| s / 2 + |a| |s q| / 65534`, and `|s q|` is
/// at most `|x| + s / 2`. To this come the roundings of f32, at most `2^-24` relative each: one a span of 64 columns for
/// the sum, and fewer than 16 others (weight, scale, integer sum, products, sum of the lanes, step).
pub(crate) struct SixteenByFour {
    weights: Vec<f32>,
    absmax: Vec<f32>,
}

/// Half a step of the activations. The quotient `8191 / largest`, the scale and the product with it are rounded,
/// three times `2^-24` of up to 8191 steps: 0.0015.
const HALF_STEP: f64 = 0.5015;

impl SixteenByFour {
    pub(crate) fn new(layer: &Quantized) -> Self {
        Self { weights: layer.dequantized(Kernels::scalar()), absmax: layer.scales.restored() }
    }

    /// One bound an output.
    pub(crate) fn for_input(&self, layer: &Quantized, x: &[f32]) -> Vec<f64> {
        let group = layer.block_size.group();
        let step = |group: &[f32]| group.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        let steps: Vec<f64> = x.chunks(group).map(|g| f64::from(step(g)) / f64::from(ACTIVATION_MAX)).collect();
        let roundings = u32::try_from(layer.cols.div_ceil(64) + 16).unwrap();
        let rounding = f64::from(roundings) * 2.0_f64.powi(-24);
        let bound = |row: usize| -> f64 {
            let error = |(col, x): (usize, &f32)| {
                let at = row * layer.cols + col;
                let absmax = f64::from(self.absmax[at / layer.block_size.get()]).abs();
                let (w, x) = (f64::from(self.weights[at]).abs(), f64::from(*x).abs());
                let half_step = HALF_STEP * steps[col / group];
                w * half_step + absmax * (x + half_step) / 65534.0 + rounding * (w * x)
            };
            x.iter().enumerate().map(error).sum()
        };
        (0..layer.rows).map(bound).collect()
    }
}
