//! What the checked boundary refuses, with which numbers, and what it documents of NaN and infinity.

mod arguments;
mod special_values;

use nf4::{Absmax, BlockSize, DYNAMIC_MAP, Isa, Kernels, NestedAbsmax, Nf4Matrix, ShapeError};

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

#[test]
fn names_of_instruction_sets() {
    let names = [Isa::Scalar, Isa::Avx2, Isa::Neon, Isa::Simd128, Isa::CortexMDsp].map(Isa::name);
    assert_eq!(names, ["scalar", "avx2", "neon", "simd128", "cortex-m-dsp"]);
    assert_eq!([Isa::NeonDotprod, Isa::NeonI8mm].map(Isa::name), ["neon-dotprod", "neon-i8mm"]);
    assert!(Kernels::available().any(|k| k.isa() == Kernels::detect().isa()));
    assert_eq!(Kernels::scalar().isa().to_string(), "scalar");
}
