//! Inputs of the 16x4 product.

use core::arch::wasm32::*;

use super::vector::*;
use crate::activations::SPAN;
use crate::isa::scalar;

/// Activations for the 16x4 multiply, in the order of [`crate::activations::SLOTS`].
pub(super) fn quantize_activations(inputs: &[f32], group: usize, values: &mut [i16], scales: &mut [f32]) {
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        let mut padded = [0.0; SPAN];
        let inputs = <&[f32; SPAN]>::try_from(inputs).unwrap_or_else(|_| {
            padded[..inputs.len()].copy_from_slice(inputs);
            &padded
        });
        let (vectors, _) = inputs.as_chunks::<8>();
        let mut q = [i16x8_splat(0); 8];
        let per_group = group / 8;
        for ((x, q), scale) in vectors.chunks(per_group).zip(q.chunks_mut(per_group)).zip(scales) {
            let mut largest = u32x4_splat(0);
            for x in x {
                largest = u32x4_max(largest, largest_bits(load_f32(x)));
            }
            let factor;
            (*scale, factor) = scalar::activation_scale(f32::from_bits(largest_u32(largest)));
            if factor > 0.0 {
                for (x, q) in x.iter().zip(q) {
                    *q = round_i16(product(load_f32(x), [f32x4_splat(factor); 2]));
                }
            }
        }
        let (out, _) = values.as_chunks_mut();
        // Columns 16i..16i+16 are bytes 8i..8i+8, which stand in the pieces 0, 2, 1, 3.
        for (i, piece) in [0, 2, 1, 3].into_iter().enumerate() {
            let (first, second) = (q[2 * i], q[2 * i + 1]);
            store_i16(&mut out[piece], i16x8_shuffle::<0, 2, 4, 6, 8, 10, 12, 14>(first, second));
            store_i16(&mut out[piece + 4], i16x8_shuffle::<1, 3, 5, 7, 9, 11, 13, 15>(first, second));
        }
    }
}

/// The nearest integers, ties to even: adding 1.5 * 2^23 leaves them in the low bits. (Converting with saturation, the
/// only conversion to integers there is, takes several instructions on x86-64.)
#[inline]
fn round_i16(x: F32x8) -> v128 {
    let [a, b] = sum(x, [f32x4_splat(12_582_912.0); 2]);
    i16x8_shuffle::<0, 2, 4, 6, 8, 10, 12, 14>(a, b)
}
