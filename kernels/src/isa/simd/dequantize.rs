//! Codes to weights.

use super::steps::{Decode, Steps};
use crate::float::Float;
use crate::isa::scalar::conversions::dequantize_segment;
use crate::matrix::Nf4Matrix;

/// The weights, rounded once to f32 and once more to `T`.
#[inline(always)]
pub(in crate::isa) fn dequantize<S: Decode<T>, T: Float>(steps: &Steps<S>, matrix: &Nf4Matrix<'_>, out: &mut [T]) {
    let mut rest = out;
    for segment in matrix.all_segments() {
        let (out, after) = rest.split_at_mut(segment.len);
        rest = after;
        match segment.whole {
            // With a finite absmax no product is NaN, so nothing has to be made canonical.
            Some(packed) if segment.absmax.is_finite() => {
                let book = steps.book(segment.absmax);
                for (packed, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                    steps.decode(&book, packed, out);
                }
            }
            _ => dequantize_segment(matrix, &segment, out),
        }
    }
}
