#![doc = include_str!("../SPEC.md")]

use crate::format::CODEBOOK;

/// The 16x4 codebook: `round(CODEBOOK[k] * 32767)`.
pub const CODEBOOK_I16: [i16; 16] = {
    let mut book = [0; 16];
    let mut k = 0;
    while k < 16 {
        let x = CODEBOOK[k] as f64 * 32767.0;
        #[allow(clippy::cast_possible_truncation, reason = "|x| <= 32767, and truncation after adding a half rounds")]
        {
            book[k] = (if x < 0.0 { x - 0.5 } else { x + 0.5 }) as i16;
        }
        k += 1;
    }
    book
};

/// What a step of [`CODEBOOK_I16`] is worth: `1 / 32767`, rounded to f32.
pub const WEIGHT_STEP: f32 = 1.0 / 32767.0;

/// The sum of the eight lanes of a row, in the one order that every product uses.
#[inline(always)]
#[must_use]
pub fn add_lanes(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}
