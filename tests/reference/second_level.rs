//! Double quantization of absmax; kind `double_quant_stats` has nothing else.

use crate::support::{Case, Checker, NestedScales, Scales, quantize_absmax};

/// The number of values from which on `PyTorch` may split its sum over threads, which changes the order.
const SPLIT_MEAN: usize = 32_768;

/// A vector of absmax without a tensor.
pub(crate) fn stats(c: &mut Checker, case: &Case) {
    let file = case.tensors();
    let (absmax, nested) = (file.values("absmax_f32"), NestedScales::from_reference(&file));
    if case.is_undefined() {
        undefined(c, &absmax);
    } else {
        quantized(c, &absmax, &nested);
    }
    restored(c, &nested, &file.values("absmax_dequantized"));
}

/// Offset, codes and nested absmax.
pub(crate) fn quantized(c: &mut Checker, absmax: &[f32], reference: &NestedScales) {
    let ours = quantize_absmax(c.kernels, absmax, None);
    if absmax.len() < SPLIT_MEAN {
        c.equal("offset", &[ours.offset], &[reference.offset]);
        c.equal("absmax_codes", &ours.codes, &reference.codes);
        c.equal("nested_absmax", &ours.absmax, &reference.absmax);
    } else {
        // Sums of positive numbers: neighbouring floats have neighbouring bits.
        let ulps = ours.offset.to_bits().abs_diff(reference.offset.to_bits());
        c.holds("offset", ulps <= 2, || format!("{} and {} are {ulps} ulp apart", ours.offset, reference.offset));
    }
    let ours = quantize_absmax(c.kernels, absmax, Some(reference.offset));
    c.equal("absmax_codes with the offset given", &ours.codes, &reference.codes);
    c.equal("nested_absmax with the offset given", &ours.absmax, &reference.absmax);
}

/// The dequantized absmax, from the reference's codes.
pub(crate) fn restored(c: &mut Checker, nested: &NestedScales, reference: &[f32]) {
    c.equal("absmax_dequantized", &Scales::Nested(nested.clone()).restored(), reference);
}

/// NaN and infinity among the absmax: what the documentation of [`Kernels::quantize_absmax`] says.
pub(crate) fn undefined(c: &mut Checker, absmax: &[f32]) {
    let run = |kernels| quantize_absmax(kernels, absmax, None);
    let ours = run(c.kernels);
    c.same_as_scalar("offset", &[ours.offset], |k| vec![run(k).offset]);
    c.same_as_scalar("absmax_codes", &ours.codes, |k| run(k).codes);
    c.same_as_scalar("nested_absmax", &ours.absmax, |k| run(k).absmax);
    c.holds("offset", !ours.offset.is_finite(), || format!("{} for input with NaN or infinity", ours.offset));
    c.equal("absmax_codes, as documented", &ours.codes, &vec![0; absmax.len()]);
    c.equal("nested_absmax, as documented", &ours.absmax, &vec![f32::NAN; ours.absmax.len()]);
}
