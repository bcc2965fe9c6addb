//! Quantization of inputs in portable code, for both arithmetics.

use crate::float::Float;
use crate::spec::{ACTIVATION_MAX, ACTIVATION_MAX_8X8, GROUP_8X8, SPAN};

/// Activations stand in the order of the columns: a byte's two weights meet two adjacent ones.
pub(in crate::isa) static SLOTS: [u8; SPAN] = {
    let mut slots = [0; SPAN];
    let mut column = 0;
    while column < SPAN {
        #[allow(clippy::cast_possible_truncation, reason = "a column of a span is below 64")]
        {
            slots[column] = column as u8;
        }
        column += 1;
    }
    slots
};

/// Quantizes inputs of the 16x4 product in groups, in the order of the columns.
pub(super) fn quantize_activations<T: Float>(inputs: &[T], group: usize, values: &mut [i16], scales: &mut [f32]) {
    // There are only these two; so the compiler knows that it is not 0.
    let group = if group == SPAN { SPAN } else { SPAN / 2 };
    let spans = inputs.chunks(SPAN).zip(values.as_chunks_mut::<SPAN>().0).zip(scales.chunks_mut(SPAN / group));
    for ((inputs, values), scales) in spans {
        values.fill(0);
        for (g, (inputs, scale)) in inputs.chunks(group).zip(scales).enumerate() {
            let factor;
            (*scale, factor) = activation_scale(largest_input(inputs), f32::from(ACTIVATION_MAX));
            if factor > 0.0 {
                for (x, value) in inputs.iter().zip(values.iter_mut().skip(g * group)) {
                    #[allow(clippy::cast_possible_truncation, reason = "|x| <= 8191, so the low 16 bits hold it")]
                    {
                        *value = round_to_bits(x.to_f32() * factor) as i16;
                    }
                }
            }
        }
    }
}

/// Quantizes inputs of the 8x8 product in groups, in the order of the columns.
pub(in crate::isa) fn quantize_activations_8x8<T: Float>(inputs: &[T], values: &mut [i8], scales: &mut [f32]) {
    let (groups, _) = inputs.as_chunks::<GROUP_8X8>();
    let (values, padding) = values.as_chunks_mut::<GROUP_8X8>().0.split_at_mut(groups.len());
    padding.iter_mut().for_each(|values| *values = [0; GROUP_8X8]);
    for ((inputs, values), scale) in groups.iter().zip(values).zip(scales) {
        let factor;
        (*scale, factor) = activation_scale(largest_input(inputs), f32::from(ACTIVATION_MAX_8X8));
        *values = [0; GROUP_8X8];
        if factor > 0.0 {
            for (x, value) in inputs.iter().zip(values) {
                #[allow(clippy::cast_possible_truncation, reason = "|x| <= 127, so the low 8 bits hold it")]
                {
                    *value = round_to_bits(x.to_f32() * factor) as i8;
                }
            }
        }
    }
}

/// The largest absolute input by its bits: NaN, if there is one.
#[inline(always)]
pub(in crate::isa) fn largest_input<T: Float>(inputs: &[T]) -> f32 {
    f32::from_bits(inputs.iter().map(|x| x.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// Scale of a group and factor that its inputs are multiplied by (0: all values are 0), from the largest absolute
/// input and the largest value.
#[inline(always)]
pub(in crate::isa) fn activation_scale(largest: f32, max: f32) -> (f32, f32) {
    let factor = max / largest;
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if factor.is_infinite() {
        (0.0, 0.0)
    } else {
        (largest / max, factor)
    }
}

/// Nearest integer, ties to even, of `|x| < 2^22`, in the low bits: adding 1.5 * 2^23 leaves it in the low bits of the
/// mantissa.
#[inline(always)]
pub(in crate::isa) fn round_to_bits(x: f32) -> u32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits()
}
