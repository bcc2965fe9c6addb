//! Kind `tables`: the constants, and the 8-bit quantizer as `bitsandbytes` holds it in a table.

use nf4::{CODEBOOK, DYNAMIC_MAP, NESTED_BLOCK, THRESHOLDS};

use crate::support::{Case, Checker, quantize_absmax};

pub(crate) fn tables(c: &mut Checker, case: &Case) {
    let file = case.tensors();
    c.equal("nf4_code", &CODEBOOK, &file.values("nf4_code"));
    c.equal("nf4_midpoints", &THRESHOLDS, &file.values("nf4_midpoints"));
    c.equal("dynamic_code", &DYNAMIC_MAP, &file.values("dynamic_code"));
    cpu_thresholds(c, &file.values("cpu_thresholds"));
    cpu_lut(c, &file.values("cpu_lut"));
}

/// Entry `k` is the smallest value whose code is above `k`; NaN if there is none.
fn cpu_thresholds(c: &mut Checker, thresholds: &[f32]) {
    c.holds("cpu_thresholds", thresholds.len() == 255, || format!("{} entries", thresholds.len()));
    let at = codes_of(c, thresholds);
    let below: Vec<f32> = thresholds.iter().map(|t| t.next_down()).collect();
    let below = codes_of(c, &below);
    for (k, t) in thresholds.iter().enumerate().filter(|(_, t)| !t.is_nan()) {
        let code = k + 1;
        c.holds("cpu_thresholds", usize::from(at[k]) >= code, || format!("{t} has code {}, not {code} or more", at[k]));
        if *t > -1.0 {
            let got = below[k];
            c.holds("cpu_thresholds", usize::from(got) < code, || format!("below {t}: code {got}, not under {code}"));
        }
    }
}

/// The table gives the code of a value by its place on a grid of 65,536 points; the values here are those points and
/// their neighbours, the borders between them, and a million others.
fn cpu_lut(c: &mut Checker, lut: &[u8]) {
    let grid = (0..lut.len()).map(|i| -1.0 + 2.0 * small(i) / small(lut.len() - 1));
    let borders = (0..lut.len()).map(|i| -1.0 + (2.0 * small(i) + 1.0) / small(lut.len() - 1));
    let evenly = (0..1 << 20).map(|i| -1.0 + small(i) / small(1 << 19));
    let mut values: Vec<f32> = grid.chain(borders).flat_map(|v| [v.next_down(), v, v.next_up()]).collect();
    values.extend(evenly);
    values.iter_mut().for_each(|v| *v = v.clamp(-1.0, 1.0));
    let expected: Vec<u8> = values.iter().map(|&v| lut[grid_point(v)]).collect();
    let got = codes_of(c, &values);
    c.equal("cpu_lut", &got, &expected);
}

/// `trunc(((t + 1) * 0.5) * 65535 + 0.5)`, the last two operations fused: one rounding of what f64 holds exactly.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the formula truncates; values in 0..=65535"
)]
fn grid_point(t: f32) -> usize {
    let half = (t + 1.0) * 0.5;
    (f64::from(half) * 65535.0 + 0.5) as f32 as usize
}

/// The codes of values in `[-1, 1]`: with offset 0 and a 1 in each block the nested absmax is 1, so nothing is scaled.
fn codes_of(c: &Checker, values: &[f32]) -> Vec<u8> {
    let blocks = values.chunks(NESTED_BLOCK - 1);
    let absmax: Vec<f32> = blocks.flat_map(|block| [1.0].into_iter().chain(block.iter().copied())).collect();
    let quantized = quantize_absmax(c.kernels, &absmax, Some(0.0));
    let blocks = quantized.codes.chunks(NESTED_BLOCK);
    blocks.flat_map(|block| block[1..].iter().copied()).collect()
}

/// An integer that f32 holds exactly.
#[allow(clippy::cast_precision_loss, reason = "below 2^24")]
fn small(i: usize) -> f32 {
    i as f32
}
