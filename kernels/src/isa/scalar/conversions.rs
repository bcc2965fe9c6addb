//! Quantization and dequantization in portable code.

use crate::float::Float;
use crate::format::{CODEBOOK, ZERO_CODE, absmax_from_bits, floored, inverse_absmax, nearest_code};
use crate::matrix::{Nf4Matrix, Segment};

/// Codes and absmax of a tensor.
pub(super) fn quantize<T: Float>(weights: &[T], block_size: usize, packed: &mut [u8], absmax: &mut [f32]) {
    let blocks = weights.chunks(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
    for ((block, packed), absmax) in blocks {
        if block.len() < block_size {
            *absmax = quantize_partial_block(block, packed);
        } else {
            *absmax = largest(block);
            let inverse = inverse_absmax(*absmax);
            pack(packed, block, |w| w * inverse);
        }
    }
}

/// The last block if it is not full: the floored absmax is what is stored, and the division is a true one
/// (`bitsandbytes` pads and reshapes whole blocks, and runs the rest through other code).
pub(in crate::isa) fn quantize_partial_block<T: Float>(block: &[T], packed: &mut [u8]) -> f32 {
    let largest = largest(block);
    let absmax = floored(largest);
    // Zeros are not divided: where subnormal numbers count as zeros, the floor does.
    pack(packed, block, |w| if largest == 0.0 { 0.0 } else { w / absmax });
    absmax
}

/// The largest absolute value; NaN if there is one.
#[inline(always)]
fn largest<T: Float>(block: &[T]) -> f32 {
    absmax_from_bits(block.iter().map(|w| w.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

#[inline(always)]
fn pack<T: Float>(packed: &mut [u8], block: &[T], scaled: impl Fn(f32) -> f32) {
    for (byte, pair) in packed.iter_mut().zip(block.chunks(2)) {
        let high = nearest_code(scaled(pair[0].to_f32()));
        let low = pair.get(1).map_or(ZERO_CODE, |w| nearest_code(scaled(w.to_f32())));
        *byte = high << 4 | low;
    }
}

/// The weights, rounded once to f32 and once more to `T`.
pub(super) fn dequantize<T: Float>(matrix: &Nf4Matrix<'_>, out: &mut [T]) {
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        dequantize_segment(matrix, &segment, out);
        rest = after;
    }
}

/// Part of a block that starts or ends anywhere.
pub(in crate::isa) fn dequantize_segment<T: Float>(matrix: &Nf4Matrix<'_>, segment: &Segment<'_>, out: &mut [T]) {
    let values = CODEBOOK.map(|c| T::from_f32(c * segment.absmax));
    for (i, o) in out.iter_mut().enumerate() {
        *o = values[matrix.code(segment.start + i)];
    }
}
