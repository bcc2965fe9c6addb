//! Quantization of any bits in every type and block size: every instruction set gives the bits of scalar code, and each
//! code is the nearest one.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::{Absmax, BlockSize, CODEBOOK, Float, Kernels, Nf4Matrix, bf16, f16, packed_len};
use nf4_fuzz::{Bytes, Floats, bits, others};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    dtype: u8,
    block_size: u8,
    elements: u16,
    floats: Floats,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let block_size = BlockSize::ALL[usize::from(input.block_size) % BlockSize::ALL.len()];
    match input.dtype % 3 {
        0 => check(&values(&input, f32::from_bits), block_size),
        1 => check(&values(&input, |bits| f16::from_bits(bits as u16)), block_size),
        _ => check(&values(&input, |bits| bf16::from_bits(bits as u16)), block_size),
    }
});

/// As many bytes a value as the type has if they are any bits, and otherwise four, rounded to the type.
fn values<T: Float>(input: &Input<'_>, from_bits: fn(u32) -> T) -> Vec<T> {
    let (elements, mut bytes) = (usize::from(input.elements) % (1 << 14), Bytes::new(input.bytes));
    if size_of::<T>() == 2 && input.floats.kind.is_multiple_of(8) {
        (0..elements).map(|_| from_bits(u32::from_le_bytes([bytes.byte(), bytes.byte(), 0, 0]))).collect()
    } else {
        let values = input.floats.take(elements, &mut bytes);
        values.into_iter().map(|x| if size_of::<T>() == 4 { from_bits(x.to_bits()) } else { T::from_f32(x) }).collect()
    }
}

fn quantize<T: Float>(k: Kernels, weights: &[T], block_size: BlockSize) -> (Vec<u8>, Vec<f32>) {
    let (mut packed, mut absmax) =
        (vec![0xa5; packed_len(weights.len())], vec![-1.0; block_size.blocks(weights.len())]);
    k.quantize(weights, block_size, &mut packed, &mut absmax).expect("the lengths fit");
    (packed, absmax)
}

fn check<T: Float>(weights: &[T], block_size: BlockSize) {
    let (packed, absmax) = quantize(Kernels::scalar(), weights, block_size);
    for k in others() {
        let other = quantize(k, weights, block_size);
        assert_eq!((&packed, bits(&absmax)), (&other.0, bits(&other.1)), "{} and scalar", k.isa());
    }
    // A type is only another way to write the f32.
    let weights: Vec<f32> = weights.iter().map(|w| w.to_f32()).collect();
    let same = quantize(Kernels::detect(), &weights, block_size);
    assert_eq!((&packed, bits(&absmax)), (&same.0, bits(&same.1)));

    let size = block_size.get();
    let code = |i: usize| packed[i / 2] >> (4 - 4 * (i % 2)) & 15;
    for (b, block) in weights.chunks(size).enumerate() {
        let codes: Vec<u8> = (b * size..).take(block.len()).map(code).collect();
        let largest =
            block.iter().fold(0.0_f32, |m, w| if w.is_nan() || m.is_nan() { f32::NAN } else { m.max(w.abs()) });
        let stored = if block.len() < size && largest < 1e-38 { 1e-38 } else { largest };
        assert_eq!(absmax[b].to_bits(), stored.to_bits(), "absmax of block {b}");
        nearest(block, &codes, largest.max(1e-38));
    }
    if weights.len() % 2 == 1 {
        assert_eq!(code(weights.len()), 7, "the last half byte");
    }

    // The round trip is at most half a gap of the codebook off, the largest of which is the first one.
    let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 1, weights.len(), block_size).expect("made to fit");
    let mut dequantized = vec![0.0; weights.len()];
    Kernels::detect().dequantize(&matrix, &mut dequantized).expect("the lengths fit");
    let half_gap = f64::from(CODEBOOK[1] - CODEBOOK[0]) / 2.0;
    for (i, (w, r)) in weights.iter().zip(&dequantized).enumerate() {
        let a = f64::from(absmax[i / size]);
        // Smaller ones are divided by the floor 1e-38 (see `nearest`), and then come out smaller than they were.
        if (1e-38..f64::from(f32::INFINITY)).contains(&a) {
            let off = (f64::from(*w) - f64::from(*r)).abs();
            assert!(off <= a * (half_gap + SLACK), "{w:e} came back as {r:e}, absmax {a:e}");
        }
    }
}

/// What rounding may do to `w / absmax`: its reciprocal is off by half an ulp, which is `2^-150 / 2^-128 = 2^-22` if it is
/// subnormal, the product and a threshold by half an ulp of 1. A value on the wrong side of a threshold is twice as far
/// from the code as it is from the threshold. Another rounding comes with the way back.
const SLACK: f64 = 2.0 * (1.0 / (1 << 22) as f64 + 2.0 / (1 << 24) as f64) + 1.0 / (1 << 24) as f64;

/// Panics if another code lies nearer to a scaled weight than the given one, by more than rounding explains.
fn nearest(block: &[f32], codes: &[u8], scale: f32) {
    for (w, code) in block.iter().zip(codes) {
        let expected = match () {
            () if scale.is_nan() || block.iter().any(|w| w.is_nan()) => 15,
            () if scale.is_infinite() => {
                if w.is_infinite() {
                    15
                } else {
                    7
                }
            }
            () => {
                let t = f64::from(*w) / f64::from(scale);
                let off = |code: u8| (f64::from(CODEBOOK[usize::from(code)]) - t).abs();
                let best = (0..16).map(off).fold(f64::INFINITY, f64::min);
                assert!(off(*code) <= best + SLACK, "code {code} for {w:e} with absmax {scale:e}");
                continue;
            }
        };
        assert_eq!(*code, expected, "code of {w} in a block of absmax {scale}");
    }
}
