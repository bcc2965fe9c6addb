//! Comparisons of one case on one ISA: what was compared, and what differed, with case, tensor, index and bits.

use std::collections::BTreeMap;

use nf4::{Kernels, Nf4Matrix};

use super::tensors::{Element, Tensor, with_float};

/// Compares results with the reference and collects the differences.
#[derive(Debug)]
pub(crate) struct Checker {
    pub(crate) kernels: Kernels,
    case: String,
    pub(crate) comparisons: usize,
    pub(crate) failures: Vec<String>,
    /// By name of the measure, the largest error seen as a fraction of what is allowed.
    pub(crate) largest: BTreeMap<&'static str, f64>,
}

impl Checker {
    pub(crate) fn new(kernels: Kernels, case: &str) -> Self {
        Self { kernels, case: case.to_owned(), comparisons: 0, failures: Vec::new(), largest: BTreeMap::new() }
    }

    /// Equal bits, where any NaN equals any NaN.
    pub(crate) fn equal<T: Element>(&mut self, tensor: &str, got: &[T], expected: &[T]) {
        self.compare(tensor, got, expected, |g, e| g.bits() == e.bits() || (g.is_nan() && e.is_nan()));
    }

    /// Equal bits to those that the portable kernels give, unless those are the ones that run.
    pub(crate) fn same_as_scalar<T: Element>(&mut self, tensor: &str, got: &[T], run: impl FnOnce(Kernels) -> Vec<T>) {
        if self.kernels != Kernels::scalar() {
            self.identical(&format!("{tensor}, against scalar"), got, &run(Kernels::scalar()));
        }
    }

    /// Equal bits, those of NaNs too: what two ISAs must give.
    pub(crate) fn identical<T: Element>(&mut self, tensor: &str, got: &[T], expected: &[T]) {
        self.compare(tensor, got, expected, |g, e| g.bits() == e.bits());
    }

    fn compare<T: Element>(&mut self, tensor: &str, got: &[T], expected: &[T], same: impl Fn(T, T) -> bool) {
        self.comparisons += 1;
        if got.len() != expected.len() {
            self.fail(tensor, &format!("expected {} elements, got {}", expected.len(), got.len()));
            return;
        }
        let mut wrong = (0..got.len()).filter(|&i| !same(got[i], expected[i]));
        if let Some(i) = wrong.next() {
            let (g, e) = (got[i], expected[i]);
            let digits = 2 * size_of::<T>();
            let message = format!(
                "index {i} of {}: expected bits {:0digits$x} ({e:?}), got {:0digits$x} ({g:?}); {} more differ",
                got.len(),
                e.bits(),
                g.bits(),
                wrong.count(),
            );
            self.fail(tensor, &message);
        }
    }

    /// `|got - expected| <= allowed(index)`; a NaN on either side fails. The largest quotient is kept under `measure`.
    pub(crate) fn within(
        &mut self,
        tensor: &str,
        measure: &'static str,
        got: &[f64],
        expected: &[f64],
        allowed: impl Fn(usize) -> f64,
    ) {
        self.comparisons += 1;
        if got.len() != expected.len() {
            self.fail(tensor, &format!("expected {} elements, got {}", expected.len(), got.len()));
            return;
        }
        let largest = self.largest.entry(measure).or_insert(0.0);
        let mut first = None;
        for (i, (g, e)) in got.iter().zip(expected).enumerate() {
            let (error, allowed) = ((g - e).abs(), allowed(i));
            if error <= allowed {
                *largest = largest.max(if error > 0.0 { error / allowed } else { 0.0 });
            } else if first.is_none() {
                first = Some(format!(
                    "{measure}, index {i}: expected {e} (bits {:016x}), got {g} (bits {:016x}); off by {error:e}, \
                     allowed {allowed:e}",
                    e.to_bits(),
                    g.to_bits(),
                ));
            }
        }
        if let Some(message) = first {
            self.fail(tensor, &message);
        }
    }

    /// A condition that is not a comparison of tensors.
    pub(crate) fn holds(&mut self, what: &str, condition: bool, message: impl FnOnce() -> String) {
        self.comparisons += 1;
        if !condition {
            self.fail(what, &message());
        }
    }

    /// Restores the weights in the type of `reference` and compares.
    pub(crate) fn dequantized(&mut self, name: &str, matrix: &Nf4Matrix<'_>, reference: &Tensor) {
        with_float!(reference.dtype, T => {
            let mut out = vec![<T as nf4::Float>::from_f32(0.0); matrix.rows() * matrix.cols()];
            self.kernels.dequantize(matrix, &mut out).unwrap();
            self.equal::<T>(name, &out, &reference.values());
        });
    }

    fn fail(&mut self, tensor: &str, message: &str) {
        self.failures.push(format!("{} on {}: {tensor}: {message}", self.case, self.kernels.isa()));
    }
}
