//! The products against float64 results.

use nf4::{Activations, Kernels};

use crate::support::{Checker, Quantized, Tensor};
use crate::truth::Row;

/// Both products of every row of `x` with a layer against `y64 = x W^T + bias`, computed in float64 from the f32
/// weights.
pub(crate) fn check(c: &mut Checker, name: &str, layer: &Quantized, x: &Tensor, bias: Option<&[f32]>, y64: &Tensor) {
    let (inputs, expected) = (x.values::<f32>(), y64.values::<f64>());
    let tolerance = f32_tolerance(layer.cols) * largest(&expected);
    c.holds(name, x.matrix_shape().1 == layer.cols && y64.matrix_shape().1 == layer.rows, || {
        format!("x {:?} and y64 {:?} do not fit {} x {}", x.shape, y64.shape, layer.rows, layer.cols)
    });
    for (n, (x, expected)) in inputs.chunks(layer.cols).zip(expected.chunks(layer.rows)).enumerate() {
        let name = format!("{name}, row {n}");
        let (plain, quantized) = (gemv_f32(c.kernels, layer, x), gemv(c.kernels, layer, x));
        c.within(&name, "f32 product", &with_bias(&plain, bias), expected, |_| tolerance);
        c.same_as_scalar(&format!("{name}, f32 product"), &plain, |k| gemv_f32(k, layer, x));
        c.same_as_scalar(&format!("{name}, 16x4 product"), &quantized, |k| gemv(k, layer, x));
        if layer.matrix().is_row_aligned() {
            let bounds = sixteen_by_four_bounds(layer, x);
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

/// What the outputs of the 16x4 product may differ by from the products with the dequantized weights, one bound per row.
pub(crate) fn sixteen_by_four_bounds(layer: &Quantized, x: &[f32]) -> Vec<f64> {
    let mut values = vec![0; Activations::values_len(x.len(), layer.block_size)];
    let mut scales = vec![0.0; Activations::scales_len(x.len(), layer.block_size)];
    let activations = Kernels::scalar().quantize_activations(x, layer.block_size, &mut values, &mut scales).unwrap();
    (0..layer.rows)
        .map(|r| Row::of(&layer.matrix(), &layer.packed, r))
        .map(|row| row.sixteen_by_four(&activations).bound + row.rounding_of_weights(x))
        .collect()
}
