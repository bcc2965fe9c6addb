//! Inputs of the 16x4 product.

use super::steps::{Floats, Steps};
use crate::activations::ACTIVATION_MAX;
use crate::isa::scalar;
use crate::spec::SPAN;

/// Quantizes inputs in groups, into the order of the table's slots.
#[inline(always)]
pub(in crate::isa) fn quantize_activations<S: Floats>(
    steps: &Steps<S>,
    inputs: &[f32],
    group: usize,
    values: &mut [i16],
    scales: &mut [f32],
) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
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
                largest = steps.max_abs(largest, steps.load(x));
            }
            let factor;
            (*scale, factor) =
                scalar::activation_scale(f32::from_bits(steps.largest_bits(largest)), f32::from(ACTIVATION_MAX));
            if factor > 0.0 {
                let factor = steps.splat(factor);
                for (x, scaled) in inputs.iter().zip(scaled) {
                    *scaled = steps.mul(steps.load(x), factor);
                }
            }
        }
        steps.arrange_i16(scaled, values);
    }
}
