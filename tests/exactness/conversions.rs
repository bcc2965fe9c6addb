//! Quantization and dequantization.

use nf4::{Absmax, BlockSize, Kernels, Nf4Matrix, bf16, f16};

use crate::{KINDS, Quantized, beside_scalar, bits, dequantized, for_all_shapes, inputs};

#[test]
fn conversions_are_the_same_bits_everywhere() {
    for_all_shapes("conversions", beside_scalar(), |k, rows, cols, block_size, g| {
        for kind in KINDS {
            let weights = inputs(kind, rows * cols, g);
            let half: Vec<f16> = weights.iter().map(|w| f16::from_bits((w.to_bits() >> 7) as u16)).collect();
            let brain: Vec<bf16> = weights.iter().map(|w| bf16::from_bits((w.to_bits() >> 16) as u16)).collect();
            let what = format!("{rows} x {cols}, {block_size:?}, {kind}, {}", k.isa());
            let scalar = Quantized::new(Kernels::scalar(), &weights, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &weights, rows, cols, block_size).bits(), scalar.bits(), "f32 {what}");
            for matrix in [scalar.plain(), scalar.nested()] {
                let expected = dequantized::<f32>(Kernels::scalar(), &matrix);
                assert_eq!(dequantized::<f32>(k, &matrix), expected, "to f32 {what}");
                assert_eq!(dequantized::<f16>(k, &matrix), dequantized::<f16>(Kernels::scalar(), &matrix), "{what}");
                assert_eq!(dequantized::<bf16>(k, &matrix), dequantized::<bf16>(Kernels::scalar(), &matrix), "{what}");
            }
            let scalar = Quantized::new(Kernels::scalar(), &half, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &half, rows, cols, block_size).bits(), scalar.bits(), "f16 {what}");
            let scalar = Quantized::new(Kernels::scalar(), &brain, rows, cols, block_size);
            assert_eq!(Quantized::new(k, &brain, rows, cols, block_size).bits(), scalar.bits(), "bf16 {what}");
        }
    });
}

/// Weights that do not fit in caches may be written past them, by stores that want an alignment; the last block is partial.
#[test]
fn large_weights_are_the_same_bits_at_any_alignment() {
    const N: usize = (33 << 20) / size_of::<f32>() + 33;
    let packed: Vec<u8> = (0..N.div_ceil(2)).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 16) as u8).collect();
    let absmax: Vec<f32> = (0..BlockSize::B64.blocks(N)).map(|i| i as f32 * 0.01 - 1000.0).collect();
    let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 1, N, BlockSize::B64).unwrap();
    let mut expected = vec![0.0; N];
    Kernels::scalar().dequantize(&matrix, &mut expected).unwrap();
    let mut out = vec![0.0_f32; N + 5];
    for k in beside_scalar() {
        for start in [0, 1, 4] {
            out.fill(7.0);
            k.dequantize(&matrix, &mut out[start..start + N]).unwrap();
            assert!(bits(&out[start..start + N]) == bits(&expected), "{} from element {start} on", k.isa());
            assert!(out[..start].iter().chain(&out[start + N..]).all(|x| *x == 7.0), "{} wrote outside", k.isa());
        }
    }
}
