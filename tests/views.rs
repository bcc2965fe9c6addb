//! What the checked boundary refuses, with which numbers, and what it documents of NaN and infinity.

use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, Isa, Kernels, NestedAbsmax, Nf4Matrix, ShapeError,
    bf16, f16,
};

fn plain<'a>(packed: &'a [u8], absmax: &'a [f32], rows: usize, cols: usize) -> Result<Nf4Matrix<'a>, ShapeError> {
    Nf4Matrix::new(packed, Absmax::Plain(absmax), rows, cols, BlockSize::B64)
}

#[test]
fn a_view_has_consistent_parts() {
    let (packed, absmax) = ([0; 96], [1.0; 4]);
    assert!(plain(&packed[..64], &absmax[..2], 2, 64).is_ok());
    for (bytes, blocks, rows, cols, expected) in [
        (63, 2, 2, 64, ShapeError::Length { what: "packed codes", expected: 64, got: 63 }),
        (65, 2, 2, 64, ShapeError::Length { what: "packed codes", expected: 64, got: 65 }),
        (64, 1, 2, 64, ShapeError::Length { what: "absmax", expected: 2, got: 1 }),
        (64, 3, 2, 64, ShapeError::Length { what: "absmax", expected: 2, got: 3 }),
        (0, 0, usize::MAX, 2, ShapeError::Overflow { rows: usize::MAX, cols: 2 }),
        (
            0,
            0,
            1 << (usize::BITS / 2),
            1 << (usize::BITS / 2),
            ShapeError::Overflow { rows: 1 << (usize::BITS / 2), cols: 1 << (usize::BITS / 2) },
        ),
        // No overflow, only far too large.
        (1, 1, usize::MAX, 1, ShapeError::Length { what: "packed codes", expected: usize::MAX / 2 + 1, got: 1 }),
    ] {
        assert_eq!(plain(&packed[..bytes], &absmax[..blocks], rows, cols).unwrap_err(), expected);
    }
    // An odd number of elements, and a partial block.
    assert!(plain(&packed[..33], &absmax[..2], 5, 13).is_ok());
    // Nothing at all, in either direction.
    assert!(plain(&[], &[], 0, usize::MAX).is_ok());
    assert!(plain(&[], &[], usize::MAX, 0).is_ok());
}

#[test]
fn nested_absmax_have_consistent_parts() {
    let (codes, scales) = ([0; 513], [1.0; 4]);
    for (blocks, nested, ok) in
        [(0, 0, true), (1, 1, true), (256, 1, true), (257, 1, false), (257, 2, true), (513, 3, true), (513, 4, false)]
    {
        let got = NestedAbsmax::new(&codes[..blocks], &DYNAMIC_MAP, &scales[..nested], 0.5);
        assert_eq!(got.is_ok(), ok, "{blocks} codes, {nested} scales: {got:?}");
    }
    let nested = NestedAbsmax::new(&codes[..257], &DYNAMIC_MAP, &scales[..2], 0.5).unwrap();
    let absmax = Absmax::Nested(nested);
    assert_eq!((absmax.len(), absmax.is_empty()), (257, false));
    let mut out = [0.0; 2];
    absmax.dequantize(255, &mut out).unwrap();
    assert_eq!(out, [DYNAMIC_MAP[0] + 0.5; 2]);
    let past_the_end = ShapeError::Length { what: "dequantized absmax", expected: 1, got: 2 };
    assert_eq!(absmax.dequantize(256, &mut out).unwrap_err(), past_the_end);
    assert!(absmax.dequantize(usize::MAX, &mut out).is_err());
    assert_eq!((Absmax::Plain(&[]).len(), Absmax::Plain(&[]).is_empty()), (0, true));
    assert_eq!((Absmax::Plain(&[1.0]).len(), Absmax::Plain(&[1.0]).is_empty()), (1, false));
}

/// Each vector of a batch has its own inputs, scales and values, and is what is made of it alone.
#[test]
fn vectors_of_a_batch_are_cut_out() {
    let (cols, batch) = (128, 3);
    let x: Vec<f32> = (0..batch * cols).map(|i| (i as f32 * 0.37).sin() * (1 + i / 64) as f32).collect();
    for k in Kernels::available() {
        let (mut values, mut scales) = (vec![0; batch * cols], vec![0.0; batch * cols / 64]);
        let all = k.quantize_activations_batch(&x, cols, BlockSize::B64, &mut values, &mut scales).unwrap();
        assert_eq!((all.inputs(), all.scales().len(), all.group()), (&*x, 6, 64));
        for (n, x) in x.chunks(cols).enumerate() {
            let (mut values, mut scales) = ([0; 128], [0.0; 2]);
            let one = k.quantize_activations(x, BlockSize::B64, &mut values, &mut scales).unwrap();
            let cut = all.vector(n);
            assert_eq!((cut.inputs(), cut.scales(), cut.cols(), cut.batch()), (x, one.scales(), cols, 1), "vector {n}");
            assert!(
                (0..cols).all(|c| all.get(n, c) == one.get(0, c)
                    && cut.get(0, c) == one.get(0, c)
                    && one.get(0, c).is_some()),
                "vector {n}"
            );
            assert_eq!(
                (cut.get(0, cols), cut.get(1, 0), all.get(n, cols), all.get(batch, 0)),
                (None, None, None, None)
            );
            // 13 bits and a sign.
            let restored = |c: usize| f32::from(cut.get(0, c).unwrap()) * cut.scales()[c / 64];
            assert!((0..cols).all(|c| (restored(c) - x[c]).abs() <= cut.scales()[c / 64]), "vector {n}");
        }
    }
}

#[test]
fn rows_are_cut_within_the_matrix() {
    let (packed, absmax) = ([0; 96], [1.0; 3]);
    let m = plain(&packed, &absmax, 3, 64).unwrap();
    #[allow(clippy::reversed_empty_ranges, reason = "that is what must be refused")]
    for (start, end) in [(0, 4), (2, 1), (4, 4), (usize::MAX, usize::MAX)] {
        assert_eq!(m.row_range(start..end).unwrap_err(), ShapeError::Rows { start, end, rows: 3 });
    }
    let inner = m.row_range(1..3).unwrap();
    assert_eq!((inner.rows(), inner.cols()), (2, 64));
    assert_eq!(inner.row_range(0..3).unwrap_err(), ShapeError::Rows { start: 0, end: 3, rows: 2 });
    assert_eq!(inner.split_at_row(3).unwrap_err(), ShapeError::Rows { start: 0, end: 3, rows: 2 });
}

#[test]
fn block_sizes_are_the_eight_of_bitsandbytes() {
    for n in (0..5000).chain([8192, usize::MAX, 65536 + 64]) {
        let known = [32, 64, 128, 256, 512, 1024, 2048, 4096].contains(&n);
        match BlockSize::new(n) {
            Ok(b) => assert!(known && b.get() == n && BlockSize::try_from(n) == Ok(b)),
            Err(e) => assert!(!known && e == ShapeError::BlockSize { got: n }),
        }
    }
}

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

/// Each vector of a batch has its own inputs, scales and values, and is what is made of it alone.
#[test]
fn vectors_of_an_8x8_batch_are_cut_out() {
    let (cols, batch) = (96, 3);
    let x: Vec<f32> = (0..batch * cols).map(|i| (i as f32 * 0.37).sin() * (1 + i / 32) as f32).collect();
    for k in Kernels::available() {
        let (mut values, mut scales) = ([0; 3 * 128], [0.0; 9]);
        let all = k.quantize_activations_8x8_batch(&x, cols, &mut values, &mut scales).unwrap();
        assert_eq!((all.inputs(), all.scales().len()), (&*x, 9));
        for (n, x) in x.chunks(cols).enumerate() {
            let (mut values, mut scales) = ([0; 128], [0.0; 3]);
            let one = k.quantize_activations_8x8(x, &mut values, &mut scales).unwrap();
            let cut = all.vector(n);
            assert_eq!((cut.inputs(), cut.scales()), (x, one.scales()), "vector {n}");
            let same = |c| all.get(n, c) == one.get(0, c) && cut.get(0, c) == one.get(0, c) && one.get(0, c).is_some();
            assert!((0..cols).all(same), "vector {n}");
            let outside = (cut.get(0, cols), cut.get(1, 0), all.get(n, cols), all.get(batch, 0));
            assert_eq!(outside, (None, None, None, None));
            // Half a step, and a rounding.
            let off = |c: usize| (f32::from(cut.get(0, c).unwrap()) * cut.scales()[c / 32] - x[c]).abs();
            assert!((0..cols).all(|c| off(c) <= 0.501 * cut.scales()[c / 32]), "vector {n}");
        }
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

#[test]
fn names_of_instruction_sets() {
    let names = [Isa::Scalar, Isa::Avx2, Isa::Neon, Isa::Simd128, Isa::CortexMDsp].map(Isa::name);
    assert_eq!(names, ["scalar", "avx2", "neon", "simd128", "cortex-m-dsp"]);
    assert_eq!([Isa::NeonDotprod, Isa::NeonI8mm].map(Isa::name), ["neon-dotprod", "neon-i8mm"]);
    assert!(Kernels::available().any(|k| k.isa() == Kernels::detect().isa()));
    assert_eq!(Kernels::scalar().isa().to_string(), "scalar");
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
