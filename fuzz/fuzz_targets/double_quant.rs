//! Double quantization of any scales: every instruction set gives the bits of scalar code, the mean is that of f64 but for
//! its rounding, and each code is the nearest one on the grid of bitsandbytes.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::{DYNAMIC_MAP, Kernels, NESTED_BLOCK};
use nf4_fuzz::{Bytes, Floats, bits, is_tame, others};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    count: u16,
    floats: Floats,
    bytes: &'a [u8],
}

/// Codes and nested scales, with an offset that is given or computed.
fn quantize(k: Kernels, absmax: &[f32], offset: Option<f32>) -> (Vec<u8>, Vec<f32>, f32) {
    let (mut codes, mut nested) = (vec![0xa5; absmax.len()], vec![-1.0; absmax.len().div_ceil(NESTED_BLOCK)]);
    let result = match offset {
        Some(o) => k.quantize_absmax_with_offset(absmax, o, &mut codes, &mut nested).map(|()| o),
        None => k.quantize_absmax(absmax, &mut codes, &mut nested),
    };
    let offset = result.expect("the lengths fit");
    (codes, nested, offset)
}

fuzz_target!(|input: Input<'_>| {
    let mut bytes = Bytes::new(input.bytes);
    let absmax = input.floats.take(usize::from(input.count) % 20_000, &mut bytes);
    let given = input.floats.take(1, &mut bytes)[0];
    for offset in [None, Some(given)] {
        let (codes, nested, used) = quantize(Kernels::scalar(), &absmax, offset);
        for k in others() {
            let other = quantize(k, &absmax, offset);
            assert_eq!((&codes, bits(&nested), used.to_bits()), (&other.0, bits(&other.1), other.2.to_bits()));
        }
        if offset.is_none() {
            check_mean(&absmax, used);
        }
        let blocks = absmax.chunks(NESTED_BLOCK).zip(codes.chunks(NESTED_BLOCK)).zip(&nested);
        blocks.for_each(|((absmax, codes), scale)| check_block(absmax, codes, *scale, used));
    }
});

/// Each value is rounded in fewer additions than there are values, and the sum once more when it is divided.
fn check_mean(absmax: &[f32], mean: f32) {
    if absmax.is_empty() {
        assert!(mean.is_nan());
    } else if is_tame(absmax, &[1.0], absmax.len()) {
        let (count, unit) = (absmax.len() as f64, 1.0 / f64::from(1 << 24));
        let magnitude: f64 = absmax.iter().map(|a| f64::from(a.abs())).sum();
        let exact = absmax.iter().map(|a| f64::from(*a)).sum::<f64>() / count;
        let gamma = (count + 1.0) * unit / (1.0 - (count + 1.0) * unit);
        let off = (f64::from(mean) - exact).abs();
        assert!(off <= gamma * magnitude / count + f64::from(f32::from_bits(1)), "mean {mean:e}, exactly {exact:e}");
    }
}

fn check_block(absmax: &[f32], codes: &[u8], scale: f32, offset: f32) {
    let shifted: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
    if !shifted.iter().all(|s| s.is_finite()) {
        assert!(scale.is_nan() && codes.iter().all(|c| *c == 0), "a block with NaN or infinity");
        return;
    }
    let largest = shifted.iter().fold(0.0_f32, |m, s| m.max(s.abs()));
    assert_eq!(scale.to_bits(), largest.to_bits());
    // Below, the reciprocal overflows, and only the sign is left.
    if scale < f32::MIN_POSITIVE {
        return;
    }
    // A grid of 65,536 points over [-1, 1] is looked up: half a step and the rounding of the place, of the scaled value and
    // of its reciprocal (2^-22 if that is subnormal). A value on the wrong side of a midpoint is twice as far off.
    let slack = 2.0 * (1.02 / 65_535.0 + 1.0 / f64::from(1 << 21));
    for (s, code) in shifted.iter().zip(codes) {
        let t = f64::from(*s) / f64::from(scale);
        let off = |entry: f32| (f64::from(entry) - t).abs();
        let best = DYNAMIC_MAP.iter().map(|entry| off(*entry)).fold(f64::INFINITY, f64::min);
        assert!(off(DYNAMIC_MAP[usize::from(*code)]) <= best + slack, "code {code} for {s:e} with scale {scale:e}");
    }
}
