//! Norms, softmax and `SiLU`, with one order of operations, so that the bits are the same on every machine.
//!
//! Everything is plain Rust over fixed lanes. A compiler may put the lanes into vectors of any width, but never adds in
//! another order, and never fuses a multiplication with an addition.

/// Lanes of a sum: element `i` belongs to lane `i % 16`.
const LANES: usize = 16;

/// The sum of `f(i)` over the elements: sixteen lanes, each in order, then a tree.
#[inline(always)]
fn lane_sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (lane, value) in lanes.iter_mut().zip(block) {
            *lane += f(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(*value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`, as `LlamaRMSNorm` computes it. All have the same length.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = rms_factor(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * factor);
    }
}

/// [`rms_norm`] in place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = rms_factor(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = weight * (*x * factor);
    }
}

fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / libm::sqrtf(lane_sum(x, |x| x * x) / x.len() as f32 + eps)
}

/// `gate = gate / (1 + e^-gate) * up`.
pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Turns scores into `e^(score * scale - max)`, and returns their sum: what a softmax is divided by.
pub(crate) fn exp_scores(scores: &mut [f32], scale: f32) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = scores.as_chunks::<LANES>();
    for block in blocks {
        for (max, score) in max.iter_mut().zip(block) {
            *max = if *score > *max { *score } else { *max };
        }
    }
    let max = max.iter().chain(rest).fold(f32::NEG_INFINITY, |m, s| if *s > m { *s } else { m });
    for score in scores.iter_mut() {
        *score = exp((*score - max) * scale);
    }
    lane_sum(scores, |score| score)
}

/// `e^x` to within two units of the last place, for `x` in -87..88; the value at the nearer end beyond that. NaN stays
/// NaN.
///
/// `libm::expf` is right to within one unit, but branches, so that no compiler makes vectors of it. This is the same
/// method, `e^x = 2^n e^r` with `|r| <= ln(2)/2`, and the polynomial of Cephes (`expf.c`).
#[must_use]
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln(2) in two parts; the first has so few bits that its products with `n` are exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2[0]) - n * LN2[1];
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p * r + c;
    }
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    (p * (r * r) + r + 1.0) * two_to_n
}

/// The FNV-1a hash of values' bits: what machines compare.
#[must_use]
pub fn hash(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|x| x.to_bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 997th f32 in the range, and its ends.
    #[test]
    fn exp_is_within_two_units() {
        let bits = (0..=88.0_f32.to_bits()).step_by(997).chain([88.0_f32.to_bits()]);
        let mut worst = 0.0_f64;
        for x in bits.map(f32::from_bits).flat_map(|x| [x, -x]).filter(|x| *x >= -87.0) {
            let (got, exact) = (exp(x), libm::exp(f64::from(x)));
            #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
            let near = exact as f32;
            let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
            worst = worst.max((f64::from(got) - exact).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst}");
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-1000.0), exp(-87.0));
        assert_eq!(exp(f32::INFINITY), exp(88.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_of_equal_scores_is_uniform() {
        for len in [1, 15, 16, 17, 33, 100] {
            let mut scores = alloc::vec![3.0; len];
            assert_eq!(exp_scores(&mut scores, 0.125), len as f32);
            assert!(scores.iter().all(|s| *s == 1.0));
        }
    }

    #[test]
    fn norms_have_unit_mean_square() {
        for len in [1, 16, 31, 64, 577] {
            let x: alloc::vec::Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin() + 0.1).collect();
            let (weight, mut out) = (alloc::vec![2.0; len], alloc::vec![0.0; len]);
            rms_norm(&x, &weight, 0.0, &mut out);
            let mean = out.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>() / len as f64;
            assert!((mean - 4.0).abs() < 1e-5, "{len}: {mean}");
            let mut same = x.clone();
            rms_norm_in_place(&mut same, &weight, 0.0);
            assert_eq!(same, out);
        }
    }
}
