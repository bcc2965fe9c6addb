//! Norms, rotations and activations, forward and backward: each goes over its rows once. Rows are shared between threads, and
//! are the same bits for any number of them.

use nf4_llama::exp;
use rayon::prelude::*;

/// Values that a thread takes at least.
const PART: usize = 1 << 13;

/// Calls `run` with the number of each row of `out`, which have `width` values, and the row.
pub(crate) fn rows(out: &mut [f32], width: usize, run: impl Fn(usize, &mut [f32]) + Sync) {
    let few = (PART / width.max(1)).max(1);
    out.par_chunks_mut(width.max(1)).with_min_len(few).enumerate().for_each(|(row, out)| run(row, out));
}

/// A vector of `len` values, for one that writes all of them: those that were there stay.
pub(crate) fn space(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    values.resize(len, 0.0);
    values
}

/// `y += x`.
pub(crate) fn add(x: &[f32], y: &mut [f32]) {
    rows(y, PART, |part, y| y.iter_mut().zip(&x[part * PART..]).for_each(|(y, x)| *y += x));
}

/// Lanes of a sum, which a compiler puts into vectors.
const LANES: usize = 16;

/// The sum of `f` over pairs of values.
pub(crate) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f(*a, *b);
        }
    }
    lanes.iter().chain(&[a_rest.iter().zip(b_rest).map(|(a, b)| f(*a, *b)).sum()]).sum()
}

/// `y = weight * x / sqrt(mean(x^2) + eps)` over rows of the length of `weight`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let width = weight.len();
    rows(y, width, |row, y| {
        let x = &x[row * width..][..width];
        let factor = rms_factor(x, eps);
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = weight * (x * factor);
        }
    });
}

fn rms_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

/// Adds the gradient of [`rms_norm`]: with `g = dy * weight` and the factor `f`, `dx += f g - x f^3 mean(g x)`.
pub(crate) fn rms_norm_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    rows(dx, width, |row, dx| {
        let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
        let factor = rms_factor(x, eps);
        let mut products = 0.0;
        for ((x, dy), weight) in x.chunks(256).zip(dy.chunks(256)).zip(weight.chunks(256)) {
            let mut g = [0.0; 256];
            g.iter_mut().zip(dy).zip(weight).for_each(|((g, dy), weight)| *g = dy * weight);
            products += sum(x, &g[..x.len()], |x, g| x * g);
        }
        let mean = products / width as f32 * factor.powi(3);
        for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            *dx += factor * (dy * weight) - x * mean;
        }
    });
}

/// Cosines and sines of the rotary embedding for the position of each token, `[tokens, pairs]`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Angles {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) pairs: usize,
}

impl Angles {
    /// Rotates a head of a token forward, or back if `sign` is -1: `y[i] = x[i] cos - x[i + pairs] sin`, and so on.
    pub(crate) fn rotate(&self, token: usize, sign: f32, x: &[f32], y: &mut [f32]) {
        let at = token * self.pairs..(token + 1) * self.pairs;
        let ((first, second), (out, rest)) = (x.split_at(self.pairs), y.split_at_mut(self.pairs));
        let angles = self.cos[at.clone()].iter().zip(&self.sin[at]);
        for ((((a, b), (cos, sin)), out), rest) in first.iter().zip(second).zip(angles).zip(out).zip(rest) {
            *out = a * cos - b * (sign * sin);
            *rest = b * cos + a * (sign * sin);
        }
    }
}

/// `y = gate / (1 + e^-gate) * up`.
pub(crate) fn silu_times(gate: &[f32], up: &[f32], y: &mut [f32]) {
    rows(y, PART, |part, y| {
        let start = part * PART;
        for ((y, gate), up) in y.iter_mut().zip(&gate[start..]).zip(&up[start..]) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    });
}

/// The gradients of [`silu_times`] in the place of `gate` and `up`: with `s = 1 / (1 + e^-gate)`, `s (1 + gate (1 - s)) up
/// dy`, and `gate s dy`.
pub(crate) fn silu_times_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    let parts = gate.par_chunks_mut(PART).zip(up.par_chunks_mut(PART)).zip(dy.par_chunks(PART));
    parts.for_each(|((gate, up), dy)| {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = 1.0 / (1.0 + exp(-*gate));
            let of_gate = s * (1.0 + *gate * (1.0 - s)) * *up * dy;
            *up = *gate * s * dy;
            *gate = of_gate;
        }
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn values(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.7 + seed).sin()).collect()
    }

    /// Compares the gradients `exact` of `sum(weights * f(inputs))` with central differences. Their step of 1/64 is off by
    /// less than 10 / 6 / 64^2 where third derivatives are below 10, and by the rounding of sums below 10 in f32, 64 * 10 *
    /// 2^-24 * 8.
    pub(crate) fn check(inputs: &[Vec<f32>], exact: &[Vec<f32>], weights: &[f32], f: impl Fn(&[Vec<f32>]) -> Vec<f32>) {
        const STEP: f32 = 1.0 / 64.0;
        assert_eq!(inputs.len(), exact.len());
        for (k, gradient) in exact.iter().enumerate() {
            assert_eq!(inputs[k].len(), gradient.len());
            for (i, gradient) in gradient.iter().enumerate() {
                let moved = |step: f32| {
                    let mut inputs = inputs.to_vec();
                    inputs[k][i] += step;
                    let y = f(&inputs);
                    assert_eq!(y.len(), weights.len());
                    y.iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum::<f64>()
                };
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                assert!((difference - f64::from(*gradient)).abs() < 1e-3, "{k}, {i}: {difference}, {gradient}");
            }
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        let (x, weight, dy) =
            (values(24, 0.0), (0..8).map(|i| 0.5 + i as f32 / 8.0).collect::<Vec<_>>(), values(24, 5.0));
        let mut dx = vec![1.0; 24];
        rms_norm_backward(&x, &weight, 1e-5, &dy, &mut dx);
        dx.iter_mut().for_each(|dx| *dx -= 1.0);
        check(&[x], &[dx], &dy, |x| {
            let mut y = vec![0.0; 24];
            rms_norm(&x[0], &weight, 1e-5, &mut y);
            y
        });

        let inputs = [values(10, 3.0), values(10, 4.0)];
        let (mut gradients, dy) = (inputs.clone(), values(10, 5.0));
        let [gate, up] = &mut gradients;
        silu_times_backward(gate, up, &dy);
        check(&inputs, &gradients, &dy, |inputs| {
            let mut y = vec![0.0; 10];
            silu_times(&inputs[0], &inputs[1], &mut y);
            y
        });
    }

    #[test]
    fn a_rotation_goes_back() {
        let angles = [0.0_f32, 0.4, 0.8, 1.2];
        let angles = Angles { cos: angles.map(f32::cos).to_vec(), sin: angles.map(f32::sin).to_vec(), pairs: 2 };
        let (x, mut y, mut back) = (values(4, 0.0), [0.0; 4], [0.0; 4]);
        angles.rotate(1, 1.0, &x, &mut y);
        assert!((y[0] - (x[0] * 0.8_f32.cos() - x[2] * 0.8_f32.sin())).abs() < 1e-6);
        angles.rotate(1, -1.0, &y, &mut back);
        assert!(back.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
