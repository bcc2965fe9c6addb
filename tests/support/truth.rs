//! The products in float64, and how far f32 results may be from them: the bounds of `kernels/SPEC.md`, term by term.

use nf4::{Activations, Activations8x8, CODEBOOK, Nf4Matrix, spec};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

fn gamma(n: usize) -> f64 {
    let nu = n as f64 * U;
    nu / (1.0 - nu)
}

/// A value and how far a computed one may be from it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Truth {
    pub value: f64,
    pub bound: f64,
}

impl Truth {
    #[track_caller]
    pub(crate) fn check(&self, got: f32, what: impl FnOnce() -> String) {
        let error = (f64::from(got) - self.value).abs();
        assert!(
            error <= self.bound,
            "{}: {got} for {}, off by {error:e}, allowed {:e}",
            what(),
            self.value,
            self.bound
        );
    }
}

/// An input and what was made of it.
struct Quantized {
    input: f32,
    scale: f32,
    value: i32,
}

/// A row of weights: for each column its code and the absmax of its block.
pub(crate) struct Row {
    pub codes: Vec<u8>,
    pub absmax: Vec<f32>,
}

impl Row {
    /// Row `r` of a matrix with these packed codes.
    pub(crate) fn of(matrix: &Nf4Matrix<'_>, packed: &[u8], r: usize) -> Self {
        let flat = r * matrix.cols()..(r + 1) * matrix.cols();
        let code = |i: usize| if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
        let (absmax, block) = (matrix.absmax(), matrix.block_size().get());
        Self { codes: flat.clone().map(code).collect(), absmax: flat.map(|i| absmax.get(i / block)).collect() }
    }

    fn terms<'a>(&'a self, x: &'a [f32]) -> impl Iterator<Item = (usize, f64, f64, f64)> + 'a {
        assert_eq!(x.len(), self.codes.len());
        self.codes.iter().zip(&self.absmax).zip(x).map(|((code, a), x)| {
            let code = usize::from(*code);
            (code, f64::from(*a), f64::from(CODEBOOK[code]), f64::from(*x))
        })
    }

    fn exact(&self, x: &[f32]) -> f64 {
        self.terms(x).map(|(_, a, w, x)| a * w * x).sum()
    }

    fn magnitude(&self, x: &[f32]) -> f64 {
        self.terms(x).map(|(_, a, w, x)| (a * w * x).abs()).sum()
    }

    /// How far the product is from that of the dequantized weights, each of which is rounded to f32.
    pub(crate) fn rounding_of_weights(&self, x: &[f32]) -> f64 {
        let underflow: f64 = x.iter().map(|x| f64::from(*x).abs()).sum::<f64>() * 2.0_f64.powi(-150);
        U * self.magnitude(x) + underflow
    }

    /// The 16x4 product.
    pub(crate) fn sixteen_by_four(&self, activations: &Activations<'_>) -> Truth {
        let (scales, group) = (activations.scales(), activations.group());
        let column = |c: usize| Quantized {
            input: activations.inputs()[c],
            scale: scales[c / group],
            value: i32::from(activations.get(0, c).unwrap()),
        };
        let weight = |code: usize| f64::from(spec::CODEBOOK_I16[code]) / 32767.0;
        let underflow = (scales.len() + 1) as f64 * 2.0_f64.powi(-130);
        self.quantized(column, weight, scales.len() + 8, underflow)
    }

    /// The 8x8 product.
    pub(crate) fn eight_by_eight(&self, activations: &Activations8x8<'_>) -> Truth {
        let scales = activations.scales();
        let column = |c: usize| Quantized {
            input: activations.inputs()[c],
            scale: scales[c / spec::GROUP_8X8],
            value: i32::from(activations.get(0, c).unwrap()),
        };
        let weight = |code: usize| f64::from(spec::CODEBOOK_I8[code]) * f64::from(spec::WEIGHT_STEP_8X8);
        let underflow = (scales.len() + 1) as f64 * 2.0_f64.powi(-136);
        self.quantized(column, weight, scales.len().div_ceil(2) + 3, underflow)
    }

    /// A product of quantized activations with quantized weights; a term is rounded at most `roundings` times.
    fn quantized(
        &self,
        column: impl Fn(usize) -> Quantized,
        weight: impl Fn(usize) -> f64,
        roundings: usize,
        underflow: f64,
    ) -> Truth {
        let x: Vec<f32> = (0..self.codes.len()).map(|c| column(c).input).collect();
        let (mut quantization, mut rounding) = (0.0, 0.0);
        for (c, (code, a, w, x)) in self.terms(&x).enumerate() {
            let (a, x) = (a.abs(), x.abs());
            let (scale, q) = (f64::from(column(c).scale), f64::from(column(c).value.abs()));
            let step_error = if scale > 0.0 { scale * (0.5 + 2.0_f64.powi(-100)) + 8.0 * U * x } else { x };
            quantization += a * (w.abs() * step_error + (weight(code) - w).abs() * (x + step_error));
            rounding += a * weight(code).abs() * scale * q;
        }
        Truth { value: self.exact(&x), bound: quantization + gamma(roundings) * rounding + underflow }
    }

    /// The f32 product.
    pub(crate) fn f32(&self, x: &[f32]) -> Truth {
        let spans = x.len().min(spec::PANEL).div_ceil(64);
        let panels = x.len().div_ceil(spec::PANEL);
        let absmax: f64 = self.absmax.iter().map(|a| f64::from(*a).abs()).sum();
        let segments = 2 * x.len().div_ceil(32);
        let underflow = (absmax + 8.0 * segments as f64) * 2.0_f64.powi(-149);
        Truth { value: self.exact(x), bound: gamma(8 + 2 * spans + panels) * self.magnitude(x) + underflow }
    }
}

/// The dense product of a row.
pub(crate) fn dense(a: &[f32], x: &[f32]) -> Truth {
    let x: Vec<Truth> = x.iter().map(|x| Truth { value: f64::from(*x), bound: 0.0 }).collect();
    dense_of(a, &x)
}

/// The dense product of a row with inputs that are results themselves.
pub(crate) fn dense_of(a: &[f32], x: &[Truth]) -> Truth {
    let terms = || a.iter().zip(x).map(|(a, x)| (f64::from(*a), x));
    let inherited: f64 = terms().map(|(a, x)| a.abs() * x.bound).sum();
    let magnitude: f64 = terms().map(|(a, x)| a.abs() * (x.value.abs() + x.bound)).sum();
    let underflow = x.len() as f64 * 2.0_f64.powi(-150);
    let bound = inherited + gamma(x.len().div_ceil(8) + 4) * magnitude + underflow;
    Truth { value: terms().map(|(a, x)| a * x.value).sum(), bound }
}

/// The product of column `c` of some rows with one input a row.
pub(crate) fn transposed(rows: &[Row], c: usize, x: &[f32]) -> Truth {
    let terms = || {
        rows.iter()
            .zip(x)
            .map(|(row, x)| f64::from(row.absmax[c]) * f64::from(CODEBOOK[usize::from(row.codes[c])]) * f64::from(*x))
    };
    let (fours, chunks) = (rows.len().min(spec::ROW_CHUNK).div_ceil(4), rows.len().div_ceil(spec::ROW_CHUNK));
    let bound = gamma(4 + fours + chunks) * terms().map(f64::abs).sum::<f64>();
    Truth { value: terms().sum(), bound: bound + rows.len() as f64 * 2.0_f64.powi(-148) }
}

/// What the product of a column of a dense matrix adds to `before`.
pub(crate) fn transposed_dense(column: &[f32], x: &[f32], before: f32) -> Truth {
    let terms = || column.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x));
    let (fours, chunks) = (column.len().min(spec::ROW_CHUNK).div_ceil(4), column.len().div_ceil(spec::ROW_CHUNK));
    let before = f64::from(before);
    let bound = gamma(3 + fours + chunks) * (before.abs() + terms().map(f64::abs).sum::<f64>());
    Truth { value: before + terms().sum::<f64>(), bound: bound + column.len() as f64 * 2.0_f64.powi(-150) }
}

/// The transposed 16x4 product of column `c` of some rows with one input a row.
pub(crate) fn transposed_16x4(rows: &[Row], c: usize, x: &[f32]) -> Truth {
    // The scale of a group, and how far what it makes of one of its numbers may be from it.
    let scale = |largest: f32| if (8191.0 / largest).is_finite() { f64::from(largest / 8191.0) } else { 0.0 };
    let error = |scale: f64, x: f64, roundings: f64| {
        if scale > 0.0 { scale * (0.5 + 2.0_f64.powi(-100)) + roundings * U * x.abs() } else { x.abs() }
    };
    let (mut value, mut quantization, mut magnitude) = (0.0, 0.0, 0.0);
    for (rows, x) in rows.chunks(spec::ROW_GROUP).zip(x.chunks(spec::ROW_GROUP)) {
        let of_weights = scale(rows.iter().fold(0.0, |m, row| row.absmax[c].abs().max(m)));
        let of_inputs = scale(x.iter().fold(0.0, |m, x| x.abs().max(m)));
        for (row, x) in rows.iter().zip(x) {
            let (w, x) = (f64::from(row.absmax[c]) * f64::from(CODEBOOK[usize::from(row.codes[c])]), f64::from(*x));
            let (of_weight, of_input) = (error(of_weights, w, 9.0), error(of_inputs, x, 8.0));
            value += w * x;
            quantization += w.abs() * of_input + of_weight * (x.abs() + of_input);
            magnitude += (w.abs() + of_weight) * (x.abs() + of_input);
        }
    }
    let (groups, chunks) = (rows.len().div_ceil(spec::ROW_GROUP), rows.len().div_ceil(spec::ROW_CHUNK));
    let bound = quantization + gamma(2 + groups.min(spec::ROW_CHUNK / spec::ROW_GROUP) + chunks) * magnitude;
    Truth { value, bound: bound + (groups + 1) as f64 * 2.0_f64.powi(-118) }
}
