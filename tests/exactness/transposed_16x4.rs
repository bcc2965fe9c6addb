//! The transposed 16x4 product: portable code against the definition in plain words, the other instruction sets and batches
//! against portable code, all within the derived bound.

use core::ops::Range;

use nf4::{Absmax, BlockSize, CODEBOOK, Gradients, Kernels, Nf4Matrix, spec};

use crate::generator::Generator;
use crate::truth::{self, Row};
use crate::{KINDS, Quantized, beside_scalar, bits, every, for_all_shapes, inputs};

/// Buffers that gradients live in, filled with what no result consists of.
struct Buffers(Vec<i16>, Vec<f32>);

impl Buffers {
    fn new(batch: usize, rows: usize) -> Self {
        Self(vec![0x5555; batch * Gradients::values_len(rows)], vec![9.0; batch * Gradients::scales_len(rows)])
    }

    fn quantize<'a>(&'a mut self, k: Kernels, x: &'a [f32], rows: usize) -> Gradients<'a> {
        k.quantize_gradients(x, rows, &mut self.0, &mut self.1).unwrap()
    }
}

/// The product with a batch, `[batch, cols]`.
fn product(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let batch = x.len() / matrix.rows();
    let mut buffers = Buffers::new(batch, matrix.rows());
    let gradients = buffers.quantize(k, x, matrix.rows());
    let mut out = vec![3.0; batch * matrix.cols()];
    k.gemm_transposed(matrix, &gradients, &mut out).unwrap();
    out
}

/// The scale of some numbers, and the factor that they are multiplied by, as the specification defines them.
fn scale(numbers: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let largest = if numbers.clone().any(f32::is_nan) { f32::NAN } else { numbers.fold(0.0, |m, x| x.abs().max(m)) };
    match 8191.0 / largest {
        _ if !largest.is_finite() => (f32::NAN, 0.0),
        factor if factor.is_infinite() => (0.0, 0.0),
        factor => (largest / 8191.0, factor),
    }
}

/// A number to an integer, with the factor of its group.
fn rounded(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// The output of a column as the specification defines it, from one input a row.
fn definition(rows: &[Row], column: usize, x: &[f32]) -> f32 {
    let mut out = 0.0_f32;
    for (rows, x) in rows.chunks(512).zip(x.chunks(512)) {
        let mut sum = 0.0_f32;
        for (rows, x) in rows.chunks(32).zip(x.chunks(32)) {
            let (of_weights, weight_factor) = scale(rows.iter().map(|row| row.absmax[column]));
            let (of_inputs, input_factor) = scale(x.iter().copied());
            let mut products = 0_i32;
            for (row, x) in rows.iter().zip(x) {
                if weight_factor > 0.0 && input_factor > 0.0 {
                    let code = CODEBOOK[usize::from(row.codes[column])];
                    products += rounded(code * (row.absmax[column] * weight_factor)) * rounded(x * input_factor);
                }
            }
            sum += products as f32 * (of_weights * of_inputs);
        }
        out += sum;
    }
    if out.is_nan() { f32::NAN } else { out }
}

/// More rows than a chunk, of a narrow matrix; and not too much for the definition.
fn more_rows(rows: usize, cols: usize) -> usize {
    if cols <= 96 { rows * 150 } else { rows * 9 }
}

/// Some of the rows of a matrix.
fn rows_of(matrix: &Nf4Matrix<'_>, q: &Quantized, rows: Range<usize>) -> Vec<Row> {
    rows.map(|r| Row::of(matrix, &q.packed, r)).collect()
}

#[test]
fn portable_products_are_those_of_the_definition() {
    let k = Kernels::scalar();
    for_all_shapes("transposed 16x4 definition", [k].into_iter(), |k, rows, cols, block_size, g| {
        let rows = more_rows(rows, cols);
        if rows == 0 {
            return;
        }
        // Each kind of weights with another kind of inputs each time, or with the same.
        let shift = g.next() as usize;
        for (i, weight_kind) in KINDS.into_iter().enumerate() {
            let kind = KINDS[(i + shift) % KINDS.len()];
            let q = Quantized::new(k, &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, rows, g);
            let what = format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}");
            let mut buffers = Buffers::new(1, rows);
            let gradients = buffers.quantize(k, &x, rows);
            for (group, x) in x.chunks(32).enumerate() {
                let (expected, factor) = scale(x.iter().copied());
                for (i, x) in x.iter().enumerate() {
                    let row = group * 32 + i;
                    let value = if factor > 0.0 { rounded(x * factor) } else { 0 };
                    assert_eq!(gradients.get(0, row).map(i32::from), Some(value), "value {row}, {what}");
                    assert_eq!(gradients.scale(0, row).map(f32::to_bits), Some(expected.to_bits()), "{what}");
                }
            }
            for matrix in [q.plain(), q.nested()] {
                let y = product(k, &matrix, &x);
                let expected: Vec<f32> = if cols.is_multiple_of(32) {
                    let all = rows_of(&matrix, &q, 0..rows);
                    (0..cols).map(|c| definition(&all, c, &x)).collect()
                } else {
                    let mut out = vec![3.0; cols];
                    k.gemv_transposed_f32(&matrix, &x, &mut out).unwrap();
                    out
                };
                assert_eq!(bits(&y), bits(&expected), "{what}");
            }
        }
    });
}

/// A batch on any instruction set has the bits of its vectors alone in portable code.
fn check_batch(k: Kernels, q: &Quantized, batch: usize, kind: &str, g: &mut Generator) {
    let Quantized { rows, cols, block_size, .. } = *q;
    // A vector that is not finite stands beside others that are.
    let x: Vec<f32> = (0..batch).flat_map(|v| inputs(if v % 3 == 1 { "bell" } else { kind }, rows, g)).collect();
    for matrix in [q.plain(), q.nested()] {
        let y = product(k, &matrix, &x);
        for (v, x) in x.chunks(rows).enumerate() {
            let expected = product(Kernels::scalar(), &matrix, x);
            let what = || format!("vector {v} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
            assert_eq!(bits(&y[v * cols..][..cols]), bits(&expected), "{}", what());
        }
    }
}

#[test]
fn products_are_the_same_bits_everywhere() {
    for_all_shapes("transposed 16x4", beside_scalar(), |k, rows, cols, block_size, g| {
        let rows = more_rows(rows, cols);
        if rows == 0 {
            return;
        }
        for weight_kind in KINDS {
            let q = Quantized::new(Kernels::scalar(), &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let kind = KINDS[g.next() as usize % KINDS.len()];
            check_batch(k, &q, 1 + g.next() as usize % 3, kind, g);
        }
    });
}

/// Every batch up to 20, and more than a tile of vectors; groups and chunks of rows, whole and partial ones, an odd number
/// of rows; half a span of columns, blocks that straddle rows.
#[test]
fn batches_give_the_bits_of_single_vectors() {
    let g = &mut Generator(15);
    for k in Kernels::available() {
        let shapes = [(1, 64), (31, 32), (33, 96), (64, 160), (127, 224), (161, 64), (545, 96), (1100, 32)];
        for (i, (rows, cols)) in shapes.into_iter().enumerate().step_by(every().min(3)) {
            for (j, block_size) in BlockSize::ALL.into_iter().enumerate().step_by(every().min(4)) {
                let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
                let batches = (1..=20).chain([63, 64, 65, 130]);
                for batch in batches.skip((i + 3 * j) % 6).step_by(6 * every().min(4)) {
                    check_batch(k, &q, batch, KINDS[g.next() as usize % KINDS.len()], g);
                }
            }
        }
        println!("transposed 16x4 batches on {}", k.isa());
    }
}

#[test]
fn products_lie_within_their_bound() {
    for_all_shapes("transposed 16x4 bounds", Kernels::available(), |k, rows, cols, block_size, g| {
        let rows = more_rows(rows, cols);
        if rows == 0 || !cols.is_multiple_of(32) {
            return;
        }
        for (weight_kind, kind) in
            [("bell", "bell"), ("subnormal", "huge"), ("bell", "subnormal"), ("sparse", "sparse"), ("zero", "bell")]
        {
            let q = Quantized::new(k, &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, rows, g);
            for matrix in [q.plain(), q.nested()] {
                let all = rows_of(&matrix, &q, 0..rows);
                for (c, y) in product(k, &matrix, &x).iter().enumerate() {
                    truth::transposed_16x4(&all, c, &x).check(*y, || {
                        format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}, column {c}, {}", k.isa())
                    });
                }
            }
        }
    });
}

/// The sums of chunks of rows, each a view of its own, make up the product; views may start at any row.
#[test]
fn products_of_views_are_those_of_their_rows() {
    for_all_shapes("transposed 16x4 views", Kernels::available(), |k, rows, cols, block_size, g| {
        let rows = more_rows(rows, cols);
        if rows == 0 {
            return;
        }
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        let x = inputs("bell", rows, g);
        for matrix in [q.plain(), q.nested()] {
            let view = |range: Range<usize>| product(k, &matrix.row_range(range.clone()).unwrap(), &x[range]);
            let mut sum = vec![0.0; cols];
            for start in (0..rows).step_by(spec::ROW_CHUNK) {
                let chunk = view(start..rows.min(start + spec::ROW_CHUNK));
                sum.iter_mut().zip(chunk).for_each(|(sum, c)| *sum += c);
            }
            assert_eq!(bits(&sum), bits(&product(k, &matrix, &x)), "{rows} x {cols}, {block_size:?}, {}", k.isa());
            let start = g.next() as usize % rows;
            let end = start + 1 + g.next() as usize % (rows - start);
            if cols.is_multiple_of(32) {
                let some = rows_of(&matrix, &q, start..end);
                let expected: Vec<_> = (0..cols).map(|c| definition(&some, c, &x[start..end])).collect();
                assert_eq!(bits(&view(start..end)), bits(&expected), "{start}..{end} of {rows} x {cols}, {}", k.isa());
            }
        }
    });
}

/// What is not finite reaches the outputs that it belongs to, and no others.
#[test]
fn only_what_meets_nan_or_infinity_is_nan() {
    const ROWS: usize = 70;
    const COLS: usize = 128;
    fn view<'a>(packed: &'a [u8], absmax: &'a [f32]) -> Nf4Matrix<'a> {
        Nf4Matrix::new(packed, Absmax::Plain(absmax), ROWS, COLS, BlockSize::B64).unwrap()
    }
    for k in Kernels::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let packed = vec![0x9c; ROWS * COLS / 2];
            let mut absmax = vec![0.5; ROWS * COLS / 64];
            let mut x = vec![0.25; 3 * ROWS];
            x[ROWS + 40] = bad;
            let y = product(k, &view(&packed, &absmax), &x);
            let nan: Vec<bool> = y.iter().map(|y| y.to_bits() == f32::NAN.to_bits()).collect();
            let expected: Vec<bool> = (0..3 * COLS).map(|i| i / COLS == 1).collect();
            assert_eq!(nan, expected, "a gradient of {bad}, {}", k.isa());
            // The second block of row 3: the second half of the columns. A vector of zeros meets it too.
            absmax[3 * 2 + 1] = bad;
            x.fill(0.0);
            let y = product(k, &view(&packed, &absmax), &x);
            let nan: Vec<bool> = y.iter().map(|y| y.to_bits() == f32::NAN.to_bits()).collect();
            let expected: Vec<bool> = (0..3 * COLS).map(|i| i % COLS >= 64).collect();
            assert_eq!(nan, expected, "an absmax of {bad}, {}", k.isa());
            assert!(y.iter().all(|y| y.is_nan() || *y == 0.0), "zeros, {}", k.isa());
        }
    }
}

/// What [`Gradients::range`] leaves of a batch has the bits of its vectors, also if it is left of what was left before.
#[test]
fn some_vectors_of_a_batch_have_their_bits() {
    let (rows, cols, batch) = (70, 96, 9);
    let g = &mut Generator(16);
    for k in Kernels::available() {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, BlockSize::B64);
        let (matrix, x) = (q.plain(), inputs("bell", batch * rows, g));
        let all = product(k, &matrix, &x);
        let mut buffers = Buffers::new(batch, rows);
        let gradients = buffers.quantize(k, &x, rows);
        for range in [0..9, 0..1, 2..7, 8..9, 4..4] {
            let some = gradients.range(range.start..9).range(0..range.len());
            assert_eq!((some.batch(), some.rows()), (range.len(), rows));
            assert_eq!(some.inputs(), &x[range.start * rows..range.end * rows]);
            for v in 0..range.len() {
                assert_eq!(some.get(v, 69), gradients.get(range.start + v, 69));
                assert_eq!(some.scale(v, 69), gradients.scale(range.start + v, 69));
            }
            assert_eq!((some.get(range.len(), 0), some.scale(range.len(), 0)), (None, None));
            let mut out = vec![3.0; range.len() * cols];
            k.gemm_transposed(&matrix, &some, &mut out).unwrap();
            assert_eq!(bits(&out), bits(&all[range.start * cols..range.end * cols]), "{range:?}, {}", k.isa());
        }
    }
}

#[test]
#[should_panic(expected = "vectors 1..4 of a batch of 3")]
fn vectors_that_are_not_there_are_a_panic() {
    let mut buffers = Buffers::new(3, 32);
    let _ = buffers.quantize(Kernels::detect(), &[1.0; 96], 32).range(1..4);
}
