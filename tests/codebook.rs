//! Where the 8-bit codebook comes from: of all factors, its one has the least error on normal weights.

use nf4::{CODEBOOK, THRESHOLDS, spec};

/// Weights in a block, the default.
const BLOCK: i32 = 64;

/// How much each code counts in the error of a block of normal weights with variance 1: its frequency, times the mean of
/// absmax squared where it occurs.
///
/// The largest absolute value of a block is below `a` with the probability `F(a)^64`, where `F(a) = erf(a / sqrt(2))` is
/// that of one weight. It has code 0 or 15; the other weights are normal ones that lie in `-a..a`.
fn importance() -> [f64; 16] {
    const STEPS: u32 = 7000;
    let below = |x: f64| 0.5 * libm::erfc(-x / core::f64::consts::SQRT_2);
    let step = 7.0 / f64::from(STEPS);
    let mut total = [0.0; 16];
    for i in 0..STEPS {
        let a = (f64::from(i) + 0.5) * step;
        let inside = 2.0 * below(a) - 1.0;
        let density = (2.0 / core::f64::consts::PI).sqrt() * (-0.5 * a * a).exp();
        let probability = f64::from(BLOCK) * inside.powi(BLOCK - 1) * density * step;
        let border = |k: usize| if k == 0 { -1.0 } else { THRESHOLDS.get(k - 1).map_or(1.0, |t| f64::from(*t)) };
        for (k, total) in total.iter_mut().enumerate() {
            let of_others = (below(a * border(k + 1)) - below(a * border(k))) / inside * f64::from(BLOCK - 1);
            let of_largest = if k == 0 || k == 15 { 0.5 } else { 0.0 };
            *total += probability * a * a * (of_others + of_largest);
        }
    }
    total
}

/// The root mean square error of a codebook whose steps are worth `step`, relative to that of the weights.
fn error(importance: &[f64; 16], book: impl Fn(usize) -> f64, step: f64) -> f64 {
    let mean = |square: &dyn Fn(usize) -> f64| (0..16).map(|k| importance[k] * square(k)).sum::<f64>();
    let value = |k: usize| f64::from(CODEBOOK[k]);
    (mean(&|k| (book(k) * step - value(k)).powi(2)) / mean(&|k| value(k).powi(2))).sqrt()
}

#[test]
fn the_8_bit_codebook_has_the_least_error_on_normal_weights() {
    let importance = importance();
    let of_factor = |factor: f64| error(&importance, |k| (f64::from(CODEBOOK[k]) * factor).round(), 1.0 / factor);
    let ours = error(&importance, |k| f64::from(spec::CODEBOOK_I8[k]), f64::from(spec::WEIGHT_STEP_8X8));
    let factors = (10_000..=12_700).map(|hundredths| f64::from(hundredths) / 100.0);
    let (best, least) = factors
        .map(|factor| (factor, of_factor(factor)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .expect("there are factors");
    println!("{best}: {least:.6}; ours {ours:.6}; 127: {:.6}", of_factor(127.0));
    assert!((best - 124.11).abs() < 0.015, "the best factor is {best}");
    assert!((ours - least).abs() < 1e-6, "{ours} is not the least error, {least}");
    assert!((0.0047..0.0049).contains(&ours) && (0.0060..0.0062).contains(&of_factor(127.0)));
    for (k, c) in spec::CODEBOOK_I8.iter().enumerate() {
        assert_eq!(f64::from(*c), (f64::from(CODEBOOK[k]) * 124.11).round());
    }
    assert_eq!(spec::WEIGHT_STEP_8X8, 1.0 / 124.11);
}

/// What the bounds of the specification say.
#[test]
fn groups_of_the_8x8_product_have_exact_sums() {
    let largest = spec::CODEBOOK_I8.iter().map(|c| i32::from(c.unsigned_abs())).max().expect("there are codes");
    let sum = largest * 32 * i32::from(spec::ACTIVATION_MAX_8X8);
    assert!(sum < 1 << 19, "{sum}");
    let off =
        |k: usize| (f64::from(spec::CODEBOOK_I8[k]) * f64::from(spec::WEIGHT_STEP_8X8) - f64::from(CODEBOOK[k])).abs();
    assert!((0..16).all(|k| off(k) < 0.0041), "{:?}", (0..16).map(off).collect::<Vec<_>>());
}
