//! What operations document of NaN, infinity, subnormal numbers, and of no numbers at all.

use nf4::{BlockSize, Kernels};

use crate::plain;

/// What the docs of `Kernels::quantize` say of bad input.
#[test]
fn quantize_documents_nan_and_infinity() {
    for k in Kernels::available() {
        let quantize = |weights: &[f32]| {
            let (mut packed, mut absmax) = ([0; 64], [0.0; 2]);
            let (bytes, blocks) = (weights.len().div_ceil(2), weights.len().div_ceil(64));
            k.quantize(weights, BlockSize::B64, &mut packed[..bytes], &mut absmax[..blocks]).unwrap();
            (packed, absmax.map(f32::to_bits))
        };
        for len in [64, 63] {
            let mut weights = [0.25; 64];
            weights[5] = -f32::NAN;
            let (packed, absmax) = quantize(&weights[..len]);
            assert_eq!(absmax[0], f32::NAN.to_bits(), "{}", k.isa());
            assert_eq!(packed[..31], [0xff; 31]);
            weights[5] = f32::NEG_INFINITY;
            let (packed, absmax) = quantize(&weights[..len]);
            assert_eq!(absmax[0], f32::INFINITY.to_bits());
            assert_eq!(packed[..3], [0x77, 0x77, 0x7f]);
        }
        assert_eq!(quantize(&[0.0; 64]).1[0], 0);
        assert_eq!(quantize(&[0.0; 63]).1[0], 1e-38_f32.to_bits());
        assert_eq!(quantize(&[-0.0; 63]).0[..32], [0x77; 32]);
    }
}

/// The reciprocal of a subnormal scale is infinite, and with a scaled value of 0 makes NaN: the first code, as of other bad
/// input.
#[test]
fn double_quantization_of_subnormal_scales() {
    for k in Kernels::available() {
        let (mut codes, mut nested) = ([9; 3], [0.0; 1]);
        let offset = k.quantize_absmax(&[1, 2, 3].map(f32::from_bits), &mut codes, &mut nested).unwrap();
        assert_eq!((offset.to_bits(), nested[0].to_bits(), codes), (2, 1, [0, 0, 255]), "{}", k.isa());
    }
}

/// An output without inputs is a sum of nothing.
#[test]
fn products_of_rows_without_columns() {
    for k in Kernels::available() {
        let m = plain(&[], &[], 3, 0).unwrap();
        let none = k.quantize_activations::<f32>(&[], BlockSize::B64, &mut [], &mut []).unwrap();
        let (mut fast, mut exact) = ([9.0; 3], [9.0; 3]);
        assert_eq!((none.cols(), none.batch()), (0, 0));
        assert_eq!((k.gemv(&m, &none, &mut fast), k.gemv_f32::<f32>(&m, &[], &mut exact)), (Ok(()), Ok(())));
        assert_eq!((fast, exact), ([0.0; 3], [0.0; 3]), "{}", k.isa());
    }
}

/// What the specification says of bad input and bad scales.
#[test]
fn products_document_nan_and_infinity() {
    for k in Kernels::available() {
        let product = |x: &[f32; 128], absmax: &[f32; 4], code: u8| {
            let packed = [code << 4 | code; 128];
            let m = plain(&packed, absmax, 2, 128).unwrap();
            let (mut values, mut scales, mut y) = ([0; 128], [0.0; 2], [0.0; 2]);
            let activations = k.quantize_activations(x, BlockSize::B64, &mut values, &mut scales).unwrap();
            k.gemv(&m, &activations, &mut y).unwrap();
            y
        };
        let nan = f32::NAN.to_bits();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 128];
            x[70] = bad;
            assert_eq!(product(&x, &[1.0; 4], 15).map(f32::to_bits), [nan; 2], "{bad} on {}", k.isa());
        }
        let [first, second] = product(&[1.0; 128], &[1.0, f32::NAN, 1.0, 1.0], 15);
        assert_eq!((first.to_bits(), second), (nan, 128.0));
        assert_eq!(product(&[1.0; 128], &[1.0, f32::INFINITY, 1.0, 1.0], 15), [f32::INFINITY, 128.0]);
        assert_eq!(product(&[0.0; 128], &[1.0; 4], 15), [0.0; 2]);
        // 8191 / m overflows: the group counts as zeros.
        assert_eq!(product(&[1e-36; 128], &[1.0; 4], 15), [0.0; 2]);
    }
}

#[test]
fn products_of_8x8_document_nan_and_infinity() {
    for k in Kernels::available() {
        let product = |x: &[f32; 128], absmax: &[f32; 4], code: u8| {
            let packed = [code << 4 | code; 128];
            let m = plain(&packed, absmax, 2, 128).unwrap();
            let (mut values, mut scales) = ([0; 3 * 128], [0.0; 3 * 4]);
            let x = x.repeat(3);
            let activations = k.quantize_activations_8x8_batch(&x, 128, &mut values, &mut scales).unwrap();
            let (mut y, mut batch) = ([0.0; 2], [0.0; 6]);
            k.gemv_8x8(&m, &activations.vector(1), &mut y).unwrap();
            k.gemm_8x8(&m, &activations, &mut batch).unwrap();
            assert_eq!(batch.map(f32::to_bits), [0, 0, 0, 1, 1, 1].map(|r: usize| y[r].to_bits()), "{}", k.isa());
            y
        };
        let nan = f32::NAN.to_bits();
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 128];
            x[70] = bad;
            assert_eq!(product(&x, &[1.0; 4], 15).map(f32::to_bits), [nan; 2], "{bad} on {}", k.isa());
        }
        let [first, second] = product(&[1.0; 128], &[1.0, f32::NAN, 1.0, 1.0], 15);
        assert_eq!(first.to_bits(), nan);
        assert!((second - 128.0).abs() < 0.2, "{second}");
        assert_eq!(product(&[1.0; 128], &[1.0, f32::INFINITY, 1.0, 1.0], 15)[0], f32::INFINITY);
        assert_eq!(product(&[0.0; 128], &[1.0; 4], 15), [0.0; 2]);
        // 127 / m overflows: the group counts as zeros.
        assert_eq!(product(&[3.7e-37; 128], &[1.0; 4], 15), [0.0; 2]);
        assert!(product(&[3.8e-37; 128], &[1.0; 4], 15)[0] > 0.0);
    }
}
