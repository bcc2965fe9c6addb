//! The 8x8 product: portable code against the definition in plain words, the other instruction sets against portable
//! code, all within the derived bound.

use nf4::{Activations8x8, Kernels, Nf4Matrix, spec};

use crate::generator::Generator;
use crate::truth::Row;
use crate::{KINDS, Quantized, beside_scalar, bits, every, for_all_shapes, gemv_f32, inputs};

/// Buffers that activations of a batch live in, filled with what no result consists of.
struct Buffers(Vec<i8>, Vec<f32>);

impl Buffers {
    fn new(batch: usize, cols: usize) -> Self {
        let (values, scales) = (Activations8x8::values_len(cols), Activations8x8::scales_len(cols));
        Self(vec![0x55; batch * values], vec![9.0; batch * scales])
    }

    fn quantize<'a>(&'a mut self, k: Kernels, x: &'a [f32], cols: usize) -> Activations8x8<'a> {
        k.quantize_activations_8x8_batch(x, cols, &mut self.0, &mut self.1).unwrap()
    }
}

fn gemv(k: Kernels, matrix: &Nf4Matrix<'_>, activations: &Activations8x8<'_>) -> Vec<f32> {
    let mut out = vec![3.0; matrix.rows()];
    k.gemv_8x8(matrix, activations, &mut out).unwrap();
    out
}

/// Values and scales of a vector as the specification defines them.
fn quantized(x: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let groups = x.chunks(32).map(|x| {
        let largest =
            if x.iter().any(|x| x.is_nan()) { f32::NAN } else { x.iter().fold(0.0_f32, |m, x| m.max(x.abs())) };
        let factor = 127.0 / largest;
        if !largest.is_finite() {
            (vec![0; 32], f32::NAN)
        } else if factor.is_infinite() {
            (vec![0; 32], 0.0)
        } else {
            (x.iter().map(|x| (x * factor).round_ties_even() as i8).collect(), largest / 127.0)
        }
    });
    let (values, scales): (Vec<_>, Vec<_>) = groups.unzip();
    (values.concat(), scales)
}

/// The product of a row as the specification defines it.
fn product(row: &Row, values: &[i8], scales: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 2];
    for (g, scale) in scales.iter().enumerate() {
        let columns = 32 * g..32 * g + 32;
        let weights = row.codes[columns.clone()].iter().map(|code| spec::CODEBOOK_I8[usize::from(*code)]);
        let sum: i32 = weights.zip(&values[columns.clone()]).map(|(w, q)| i32::from(w) * i32::from(*q)).sum();
        sums[g % 2] += sum as f32 * (row.absmax[columns.start] * scale);
    }
    let y = (sums[0] + sums[1]) * spec::WEIGHT_STEP_8X8;
    if y.is_nan() { f32::NAN } else { y }
}

#[test]
fn portable_products_are_those_of_the_definition() {
    let k = Kernels::scalar();
    for_all_shapes("8x8 definition", [k].into_iter(), |k, rows, cols, block_size, g| {
        for (weight_kind, kind) in KINDS.iter().flat_map(|w| KINDS.map(|x| (*w, x))) {
            let q = Quantized::new(k, &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, cols, g);
            let mut buffers = Buffers::new(usize::from(cols > 0), cols);
            let activations = buffers.quantize(k, &x, cols);
            let what = format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}");
            if !cols.is_multiple_of(32) {
                assert_eq!((activations.get(0, 0), activations.scales().len()), (None, 0), "{what}");
                assert_eq!(bits(&gemv(k, &q.plain(), &activations)), bits(&gemv_f32(k, &q.plain(), &x)), "{what}");
                continue;
            }
            let (values, scales) = quantized(&x);
            let in_order: Vec<_> = (0..cols).map(|c| activations.get(0, c).unwrap()).collect();
            assert_eq!(in_order, values, "values {what}");
            assert_eq!(bits(activations.scales()), bits(&scales), "scales {what}");
            for matrix in [q.plain(), q.nested()] {
                let expected: Vec<_> =
                    (0..rows).map(|r| product(&Row::of(&matrix, &q.packed, r), &values, &scales)).collect();
                assert_eq!(bits(&gemv(k, &matrix, &activations)), bits(&expected), "{what}");
            }
        }
    });
}

#[test]
fn products_are_the_same_bits_everywhere() {
    for_all_shapes("8x8 products", beside_scalar(), |k, rows, cols, block_size, g| {
        for (weight_kind, kind) in KINDS.iter().flat_map(|w| KINDS.map(|x| (*w, x))) {
            if weight_kind != "bell" && kind != "bell" && weight_kind != kind {
                continue;
            }
            let q = Quantized::new(Kernels::scalar(), &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, cols, g);
            let what = format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}, {}", k.isa());
            let mut buffers = [0, 1].map(|_| Buffers::new(usize::from(cols > 0), cols));
            let [here, there] = &mut buffers;
            let (activations, expected) = (here.quantize(k, &x, cols), there.quantize(Kernels::scalar(), &x, cols));
            let values = |a: &Activations8x8<'_>| (0..cols).map(|c| a.get(0, c)).collect::<Vec<_>>();
            assert_eq!(values(&activations), values(&expected), "activations {what}");
            assert_eq!(bits(activations.scales()), bits(expected.scales()), "scales {what}");
            for matrix in [q.plain(), q.nested()] {
                let (y, expected) = (gemv(k, &matrix, &activations), gemv(Kernels::scalar(), &matrix, &expected));
                assert_eq!(bits(&y), bits(&expected), "{what}");
            }
        }
    });
}

#[test]
fn products_lie_within_their_bounds() {
    for_all_shapes("8x8 bounds", Kernels::available(), |k, rows, cols, block_size, g| {
        if !cols.is_multiple_of(32) {
            return;
        }
        for (weight_kind, kind) in
            [("bell", "bell"), ("subnormal", "huge"), ("bell", "subnormal"), ("sparse", "sparse"), ("zero", "bell")]
        {
            let q = Quantized::new(k, &inputs(weight_kind, rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, cols, g);
            let mut buffers = Buffers::new(usize::from(cols > 0), cols);
            let activations = buffers.quantize(k, &x, cols);
            for matrix in [q.plain(), q.nested()] {
                for (r, y) in gemv(k, &matrix, &activations).iter().enumerate() {
                    Row::of(&matrix, &q.packed, r).eight_by_eight(&activations).check(*y, || {
                        format!("{rows} x {cols}, {block_size:?}, {weight_kind} x {kind}, row {r}, {}", k.isa())
                    });
                }
            }
        }
    });
}

#[test]
fn results_do_not_depend_on_how_rows_are_split() {
    for_all_shapes("8x8 splits", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        let batch = if cols == 0 { 0 } else { 3 };
        let x = inputs("bell", batch * cols, g);
        let mut buffers = Buffers::new(batch, cols);
        let activations = buffers.quantize(k, &x, cols);
        let gemm = |matrix: &Nf4Matrix<'_>| {
            let mut out = vec![3.0; matrix.rows() * batch];
            k.gemm_8x8(matrix, &activations, &mut out).unwrap();
            out
        };
        for matrix in [q.plain(), q.nested()] {
            let whole = gemm(&matrix);
            for row in 0..=rows {
                let (top, bottom) = matrix.split_at_row(row).unwrap();
                let joined = [gemm(&top), gemm(&bottom)].concat();
                assert_eq!(bits(&joined), bits(&whole), "{rows} x {cols}, {block_size:?} at {row}, {}", k.isa());
                if batch > 0 {
                    let vector = activations.vector(0);
                    let single = [gemv(k, &top, &vector), gemv(k, &bottom, &vector)].concat();
                    let expected: Vec<_> = whole.iter().copied().step_by(batch).collect();
                    assert_eq!(bits(&single), bits(&expected), "{rows} x {cols}, {block_size:?}, one, {}", k.isa());
                }
            }
        }
    });
}

/// The columns of a product with a batch have the bits of the products with its vectors, in portable code.
fn check_batch(k: Kernels, q: &Quantized, batch: usize, g: &mut Generator) {
    let Quantized { rows, cols, block_size, .. } = *q;
    let kind = KINDS[g.next() as usize % KINDS.len()];
    let x: Vec<f32> = (0..batch).flat_map(|_| inputs(kind, cols, g)).collect();
    let mut buffers = Buffers::new(batch, cols);
    let activations = buffers.quantize(k, &x, cols);
    for matrix in [q.plain(), q.nested()] {
        let mut y = vec![3.0; rows * batch];
        k.gemm_8x8(&matrix, &activations, &mut y).unwrap();
        for (n, x) in x.chunks(cols.max(1)).enumerate() {
            let column = bits(&(0..rows).map(|r| y[r * batch + n]).collect::<Vec<_>>());
            let mut buffers = Buffers::new(1, cols);
            let single = buffers.quantize(Kernels::scalar(), x, cols);
            let expected = bits(&gemv(Kernels::scalar(), &matrix, &single));
            let what = || format!("vector {n} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
            assert_eq!(column, expected, "{}", what());
        }
    }
}

#[test]
fn batches_give_the_bits_of_single_vectors() {
    for_all_shapes("8x8 batches", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [0, 1, 2, 3, 7, 8, 131].into_iter().filter(|_| cols > 0) {
            if batch <= 8 || rows * cols <= 5000 {
                check_batch(k, &q, batch, g);
            }
        }
    });
}

/// Every batch up to 40, and panels of weights, one and several in each direction, whole and partial ones: rows that
/// are not whole tiles, rows that end in half a span, blocks that straddle rows.
#[test]
fn batches_give_the_bits_of_single_vectors_over_all_panels() {
    let g = &mut Generator(13);
    for k in Kernels::available() {
        let shapes = [(33, 96), (16, 1024), (17, 1088), (70, 544), (15, 2080), (1, 4128), (31, 1056)];
        for (i, (rows, cols)) in shapes.into_iter().enumerate().step_by(every().min(3)) {
            for (j, block_size) in nf4::BlockSize::ALL.into_iter().enumerate().step_by(every().min(4)) {
                let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
                // All of the batches with one shape and block size or another.
                let batches = (1..=40).chain([63, 64, 65, 130]);
                batches
                    .skip((i + 3 * j) % 7)
                    .step_by(7 * every().min(4))
                    .for_each(|batch| check_batch(k, &q, batch, g));
            }
        }
        // More rows and more vectors than a tile has.
        let q = Quantized::new(k, &inputs("bell", 131 * 96, g), 131, 96, nf4::BlockSize::B64);
        check_batch(k, &q, 130, g);
        println!("8x8 panels on {}", k.isa());
    }
}
