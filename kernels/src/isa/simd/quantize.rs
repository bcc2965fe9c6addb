//! Weights to codes and absmax.

use super::steps::{Steps, Widen};
use crate::float::Float;
use crate::format::{absmax_from_bits, inverse_absmax};
use crate::isa::scalar::conversions::quantize_partial_block;

/// Codes and absmax of a tensor.
#[inline(always)]
pub(in crate::isa) fn quantize<S: Widen<T>, T: Float>(
    steps: &Steps<S>,
    weights: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
    for ((block, packed), absmax) in blocks {
        if block.len() < block_size {
            *absmax = quantize_partial_block(block, packed);
            continue;
        }
        let mut largest = steps.splat(0.0);
        for x in block.as_chunks().0 {
            largest = steps.max_abs(largest, steps.widen(x));
        }
        *absmax = absmax_from_bits(steps.largest_bits(largest));
        let inverse = inverse_absmax(*absmax);
        for (x, packed) in block.as_chunks::<32>().0.iter().zip(packed.as_chunks_mut().0) {
            let (x, _) = x.as_chunks();
            *packed =
                steps.encode([steps.widen(&x[0]), steps.widen(&x[1]), steps.widen(&x[2]), steps.widen(&x[3])], inverse);
        }
    }
}
