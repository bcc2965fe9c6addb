//! Operations refuse arguments that do not fit, with the numbers.

use nf4::{Absmax, Activations, Activations8x8, BlockSize, Kernels, Nf4Matrix, ShapeError, bf16, f16};

use crate::plain;

#[test]
fn operations_check_every_length() {
    for k in Kernels::available() {
        let (packed, absmax) = ([0; 64], [1.0; 2]);
        let m = plain(&packed, &absmax, 2, 64).unwrap();
        let length = |what, expected, got| Err(ShapeError::Length { what, expected, got });
        let b = BlockSize::B64;

        assert_eq!(k.quantize(&[0.0; 65], b, &mut [0; 32], &mut [0.0; 2]), length("packed codes", 33, 32));
        assert_eq!(k.quantize(&[0.0; 65], b, &mut [0; 33], &mut [0.0; 1]), length("absmax", 2, 1));
        assert_eq!(k.dequantize(&m, &mut [0.0; 127]), length("dequantized weights", 128, 127));
        assert_eq!(k.dequantize(&m, &mut [f16::ZERO; 129]), length("dequantized weights", 128, 129));
        assert_eq!(k.dequantize(&m, &mut [bf16::ZERO; 0]), length("dequantized weights", 128, 0));
        let coded = k.quantize_absmax_with_offset(&[0.0; 3], 0.0, &mut [0; 2], &mut [0.0; 1]);
        assert_eq!(coded, length("absmax codes", 3, 2));
        assert!(k.quantize_absmax(&[0.0; 257], &mut [0; 257], &mut [0.0; 1]).is_err());
        assert!(k.quantize_activations(&[0.0; 64], b, &mut [0; 63], &mut [0.0; 1]).is_err());
        assert!(k.quantize_activations(&[0.0; 64], b, &mut [0; 64], &mut [0.0; 2]).is_err());

        let (mut values, mut scales) = ([0; 64], [0.0; 2]);
        let coarse = k.quantize_activations(&[0.0; 64], b, &mut values, &mut scales[..1]).unwrap();
        assert_eq!(k.gemv(&m, &coarse, &mut [0.0; 3]), length("outputs", 2, 3));
        assert_eq!(k.gemv_f32(&m, &[0.0; 63], &mut [0.0; 2]), length("inputs", 64, 63));
        assert_eq!(k.gemv_f32(&m, &[0.0; 64], &mut [0.0; 1]), length("outputs", 2, 1));
        assert_eq!(k.gemv_dense(&[0.0; 5], &[0.0; 3], &mut [0.0; 2]), length("dense matrix", 6, 5));
        assert_eq!(k.gemv_dense(&[f16::ZERO; 7], &[0.0; 3], &mut [0.0; 2]), length("dense matrix", 6, 7));
        assert_eq!(k.gemm_dense(&[bf16::ZERO; 6], &[0.0; 7], 2, &mut [0.0; 4]), length("inputs", 6, 7));
        assert_eq!(k.gemm_dense(&[bf16::ZERO; 6], &[0.0; 6], 2, &mut [0.0; 5]), length("outputs", 4, 5));
        assert_eq!(k.gemm_dense(&[bf16::ZERO; 5], &[0.0; 6], 2, &mut [0.0; 4]), length("dense matrix", 6, 5));
        assert_eq!(k.gemm_dense(&[0.0; 5], &[0.0; 6], 0, &mut []), length("inputs", 0, 6));
        assert_eq!(k.gemm_dense(&[0.0; 5], &[], 0, &mut []), Ok(()));
        assert_eq!(k.gemm_dense_add(&[0.0; 6], &[0.0; 7], 2, 1.0, &mut [0.0; 4]), length("inputs", 6, 7));
        assert_eq!(k.gemm_dense_add(&[0.0; 6], &[0.0; 6], 2, 1.0, &mut [0.0; 5]), length("outputs", 4, 5));
        assert_eq!(k.gemm_dense_add(&[0.0; 5], &[0.0; 6], 2, 1.0, &mut [0.0; 4]), length("dense matrix", 6, 5));
        assert_eq!(k.gemm_dense_add(&[0.0; 5], &[0.0; 6], 0, 1.0, &mut []), length("inputs", 0, 6));
        assert_eq!(k.gemm_dense_add(&[0.0; 5], &[], 0, 1.0, &mut []), Ok(()));
        let narrow = Nf4Matrix::new(&packed[..32], Absmax::Plain(&absmax), 1, 64, BlockSize::B32).unwrap();
        assert_eq!(k.gemv(&narrow, &coarse, &mut [0.0; 1]), Err(ShapeError::Group { expected: 32, got: 64 }));
        let wide = plain(&packed, &absmax, 1, 128).unwrap();
        assert_eq!(k.gemv(&wide, &coarse, &mut [0.0; 1]), length("activations", 128, 64));

        let (mut values, mut scales) = ([0; 192], [0.0; 3]);
        assert!(k.quantize_activations_batch(&[0.0; 191], 64, b, &mut values, &mut scales).is_err());
        assert!(k.quantize_activations_batch(&[0.0; 192], 64, b, &mut values[..128], &mut scales).is_err());
        let three = k.quantize_activations_batch(&[0.0; 192], 64, b, &mut values, &mut scales).unwrap();
        assert_eq!((three.batch(), three.cols(), three.vector(2).batch()), (3, 64, 1));
        assert_eq!(k.gemm(&m, &three, &mut [0.0; 5]), length("outputs", 6, 5));
        assert_eq!(k.gemm(&m, &three, &mut [0.0; 6]), Ok(()));
        assert_eq!(k.gemm(&wide, &three, &mut [0.0; 3]), length("activations", 128, 64));
        assert_eq!(k.gemm(&narrow, &three, &mut [0.0; 3]), Err(ShapeError::Group { expected: 32, got: 64 }));
        assert_eq!(k.gemv(&m, &three, &mut [0.0; 2]), length("vectors of the batch", 1, 3));
        assert_eq!(k.gemm_f32(&m, &[0.0; 100], &mut [0.0; 2]), length("inputs", 64, 100));
        assert_eq!(k.gemm_f32(&m, &[0.0; 128], &mut [0.0; 3]), length("outputs", 4, 3));
        assert_eq!(k.gemv_transposed_f32(&m, &[0.0; 3], &mut [0.0; 64]), length("inputs", 2, 3));
        assert_eq!(k.gemv_transposed_f32(&m, &[0.0; 2], &mut [0.0; 63]), length("outputs", 64, 63));
        assert_eq!(k.gemm_transposed_f32(&m, &[0.0; 3], &mut [0.0; 64]), length("inputs", 2, 3));
        assert_eq!(k.gemm_transposed_f32(&m, &[0.0; 4], &mut [0.0; 64]), length("outputs", 128, 64));
        assert_eq!(k.gemm_transposed_f32(&m, &[], &mut [0.0; 64]), length("outputs", 0, 64));
        let (no_rows, mut out) = (m.row_range(0..0).unwrap(), [1.0; 128]);
        assert_eq!(k.gemm_transposed_f32(&no_rows, &[], &mut out), Ok(()));
        assert_eq!(out, [0.0; 128]);
        assert_eq!(k.gemm_transposed_f32(&no_rows, &[1.0], &mut out), length("inputs", 0, 1));
        assert_eq!(k.gemm_transposed_f32(&no_rows, &[], &mut [0.0; 65]), length("outputs", 64, 65));
        let dense = [0.0; 6];
        assert_eq!(k.gemm_transposed_dense_add(&dense, &[0.0; 5], 2, &mut [0.0; 6]), length("inputs", 4, 5));
        assert_eq!(k.gemm_transposed_dense_add(&dense, &[0.0; 4], 2, &mut [0.0; 7]), length("outputs", 6, 7));
        assert_eq!(k.gemm_transposed_dense_add(&dense[..5], &[0.0; 4], 2, &mut out[..6]), length("dense matrix", 6, 5));
        println!("lengths on {}", k.isa());
    }
}

#[test]
fn buffers_of_unquantized_activations_are_empty() {
    for (len, block_size, values, scales) in [
        (64, BlockSize::B64, 64, 1),
        (96, BlockSize::B32, 128, 3),
        (96, BlockSize::B64, 0, 0),
        (192, BlockSize::B4096, 192, 3),
        (33, BlockSize::B32, 0, 0),
        (0, BlockSize::B64, 0, 0),
    ] {
        assert_eq!(Activations::values_len(len, block_size), values, "{len} {block_size:?}");
        assert_eq!(Activations::scales_len(len, block_size), scales, "{len} {block_size:?}");
    }
}

/// The 8x8 product checks as the 16x4 product does; a group is 32 columns for every block size.
#[test]
fn operations_of_the_8x8_product_check_every_length() {
    for (len, values, scales) in [(64, 64, 2), (96, 128, 3), (32, 64, 1), (33, 0, 0), (0, 0, 0)] {
        assert_eq!((Activations8x8::values_len(len), Activations8x8::scales_len(len)), (values, scales), "{len}");
    }
    let cols = usize::MAX - 31;
    assert_eq!(Activations8x8::values_len(cols), usize::MAX);
    let length = |what, expected, got| Err(ShapeError::Length { what, expected, got });
    for k in Kernels::available() {
        let none = k.quantize_activations_8x8_batch::<f32>(&[], cols, &mut [], &mut []).unwrap();
        assert_eq!((none.cols(), none.batch()), (cols, 0));
        let ragged = k.quantize_activations_8x8_batch(&[0.0; 191], 64, &mut [0; 192], &mut [0.0; 6]).map(drop);
        assert_eq!(ragged, length("inputs", 128, 191));
        let short = k.quantize_activations_8x8(&[0.0; 64], &mut [0; 63], &mut [0.0; 2]).map(drop);
        assert_eq!(short, length("activation values", 64, 63));
        let long = k.quantize_activations_8x8(&[0.0; 64], &mut [0; 64], &mut [0.0; 3]).map(drop);
        assert_eq!(long, length("activation scales", 2, 3));

        let (packed, absmax) = ([0; 64], [1.0; 2]);
        let (m, wide) = (plain(&packed, &absmax, 2, 64).unwrap(), plain(&packed, &absmax, 1, 128).unwrap());
        let (mut values, mut scales) = ([0; 192], [0.0; 6]);
        let three = k.quantize_activations_8x8_batch(&[0.0; 192], 64, &mut values, &mut scales).unwrap();
        let one = three.vector(2);
        assert_eq!((three.batch(), three.cols(), one.batch(), one.cols()), (3, 64, 1, 64));
        assert_eq!(k.gemv_8x8(&m, &one, &mut [0.0; 3]), length("outputs", 2, 3));
        assert_eq!(k.gemv_8x8(&wide, &one, &mut [0.0; 1]), length("activations", 128, 64));
        assert_eq!(k.gemv_8x8(&m, &three, &mut [0.0; 2]), length("vectors of the batch", 1, 3));
        assert_eq!(k.gemm_8x8(&m, &three, &mut [0.0; 5]), length("outputs", 6, 5));
        assert_eq!(k.gemm_8x8(&wide, &three, &mut [0.0; 3]), length("activations", 128, 64));
        assert_eq!(k.gemm_8x8(&m, &three, &mut [0.0; 6]), Ok(()));
        let empty = plain(&[], &[], 3, 0).unwrap();
        let none = k.quantize_activations_8x8::<f32>(&[], &mut [], &mut []).unwrap();
        let mut y = [9.0; 3];
        assert_eq!((k.gemv_8x8(&empty, &none, &mut y), y), (Ok(()), [0.0; 3]));
        println!("lengths of 8x8 on {}", k.isa());
    }
}

/// The last multiple of a group has no multiple of a span above it.
#[test]
fn lengths_of_activations_do_not_overflow() {
    let cols = usize::MAX - 31;
    assert_eq!(Activations::values_len(cols, BlockSize::B32), usize::MAX);
    assert_eq!(Activations::values_len(usize::MAX - 63, BlockSize::B64), usize::MAX - 63);
    for k in Kernels::available() {
        let none = k.quantize_activations_batch::<f32>(&[], cols, BlockSize::B32, &mut [], &mut []).unwrap();
        assert_eq!((none.cols(), none.batch()), (cols, 0));
        let (mut values, mut scales) = ([0; 64], [0.0; 2]);
        let few = k.quantize_activations_batch(&[0.0; 64], cols, BlockSize::B32, &mut values, &mut scales);
        assert_eq!(few.unwrap_err(), ShapeError::Length { what: "inputs", expected: 0, got: 64 });
    }
}

#[test]
fn errors_carry_the_numbers() {
    for (error, text) in [
        (ShapeError::BlockSize { got: 48 }, "block size 48: expected 32, 64, 128, 256, 512, 1024, 2048 or 4096"),
        (ShapeError::Length { what: "absmax", expected: 2, got: 3 }, "absmax: expected length 2, got 3"),
        (ShapeError::Overflow { rows: 3, cols: 9 }, "a matrix of 3 x 9 elements does not fit in the address space"),
        (ShapeError::Rows { start: 1, end: 5, rows: 4 }, "rows 1..5 do not lie in 0..4"),
        (
            ShapeError::Group { expected: 32, got: 64 },
            "activations are quantized in groups of 64, but the matrix's block size needs groups of 32",
        ),
    ] {
        assert_eq!(error.to_string(), text);
    }
}
