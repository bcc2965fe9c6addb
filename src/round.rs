//! Rounding of values that were computed in f64.

use nf4_kernels::Float;

/// The nearest f32, ties to even; every NaN becomes [`f32::NAN`].
pub(crate) fn to_f32(x: f64) -> f32 {
    #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    f32::from_f32(x as f32)
}
