//! Inputs of the 16x4 product.

use core::arch::aarch64::*;

use super::vector::*;
use crate::activations::SPAN;
use crate::isa::scalar;

/// Activations for the 16x4 multiply, in the order of [`crate::activations::SLOTS`].
#[target_feature(enable = "neon")]
pub(super) fn quantize_activations(inputs: &[f32], group: usize, values: &mut [i16], scales: &mut [f32]) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
            padded[..inputs.len()].copy_from_slice(inputs);
            &padded
        });
        let (vectors, _) = inputs.as_chunks::<8>();
        let mut q = [vdupq_n_s16(0); 8];
        let per_group = group / 8;
        for ((x, q), scale) in vectors.chunks(per_group).zip(q.chunks_mut(per_group)).zip(scales) {
            let mut largest = vdupq_n_u32(0);
            for x in x {
                largest = vmaxq_u32(largest, largest_bits(load_f32(x)));
            }
            let factor;
            (*scale, factor) = scalar::activation_scale(f32::from_bits(vmaxvq_u32(largest)));
            if factor > 0.0 {
                for (x, q) in x.iter().zip(q) {
                    let [a, b] = load_f32(x);
                    let [a, b] = [vcvtnq_s32_f32(vmulq_n_f32(a, factor)), vcvtnq_s32_f32(vmulq_n_f32(b, factor))];
                    *q = vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
                }
            }
        }
        let (out, _) = values.as_chunks_mut();
        // Of each half of the span every second column, twice.
        for (q, out) in q.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<4>().0) {
            let [a, c] = split(split(q[0], q[1])[0], split(q[2], q[3])[0]);
            let [b, d] = split(split(q[0], q[1])[1], split(q[2], q[3])[1]);
            for (out, q) in out.iter_mut().zip([a, b, c, d]) {
                store_i16(out, q);
            }
        }
    }
}

/// The even and the odd elements.
#[target_feature(enable = "neon")]
#[inline]
fn split(a: int16x8_t, b: int16x8_t) -> [int16x8_t; 2] {
    [vuzp1q_s16(a, b), vuzp2q_s16(a, b)]
}
