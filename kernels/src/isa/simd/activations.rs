//! Inputs of the products with integers.

use super::steps::{Steps, Widen};
use super::steps_8x8::Steps8x8;
use crate::float::Float;
use crate::isa::scalar::activations::activation_scale;
use crate::spec::{ACTIVATION_MAX, ACTIVATION_MAX_8X8, GROUP_8X8, SPAN};

/// Quantizes inputs in groups, into the order of the table's slots.
#[inline(always)]
pub(in crate::isa) fn quantize_activations<S: Widen<T>, T: Float>(
    steps: &Steps<S>,
    inputs: &[T],
    group: usize,
    values: &mut [i16],
    scales: &mut [f32],
) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        quantize_span(steps, inputs, group, f32::from(ACTIVATION_MAX), values, scales);
    }
}

/// Quantizes inputs of the 8x8 product, into the order of the table's slots. `floats` are steps for the arithmetic.
#[inline(always)]
pub(in crate::isa) fn quantize_activations_8x8<F: Widen<T>, S: Steps8x8, T: Float>(
    floats: &Steps<F>,
    steps: &Steps<S>,
    inputs: &[T],
    values: &mut [i8],
    scales: &mut [f32],
) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / GROUP_8X8));
    for ((inputs, values), scales) in spans {
        let mut wide = [0; SPAN];
        quantize_span(floats, inputs, GROUP_8X8, f32::from(ACTIVATION_MAX_8X8), &mut wide, scales);
        steps.narrow(&wide, values);
    }
}

/// Quantizes a span to integers up to `max`.
#[inline(always)]
fn quantize_span<S: Widen<T>, T: Float>(
    steps: &Steps<S>,
    inputs: &[T],
    group: usize,
    max: f32,
    values: &mut [i16; SPAN],
    scales: &mut [f32],
) {
    let mut padded = [T::from_f32(0.0); SPAN];
    let inputs = <&[T; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
        padded[..inputs.len()].copy_from_slice(inputs);
        &padded
    });
    let zero = steps.splat(0.0);
    let mut scaled = [zero; 8];
    let per_group = group / 8;
    let groups = inputs.as_chunks().0.chunks(per_group).zip(scaled.chunks_mut(per_group));
    for ((inputs, scaled), scale) in groups.zip(scales) {
        let mut largest = zero;
        for x in inputs {
            largest = steps.max_abs(largest, steps.widen(x));
        }
        let factor;
        (*scale, factor) = activation_scale(f32::from_bits(steps.largest_bits(largest)), max);
        if factor > 0.0 {
            let factor = steps.splat(factor);
            for (x, scaled) in inputs.iter().zip(scaled) {
                *scaled = steps.mul(steps.widen(x), factor);
            }
        }
    }
    steps.arrange_i16(scaled, values);
}
