//! The f32 product with a transposed matrix.

use nf4::{Float, Kernels, Nf4Matrix, spec};

use crate::truth::{self, Row};
use crate::{KINDS, Quantized, bits, for_all_shapes, inputs};

#[test]
fn transposed_products_are_the_same_bits_everywhere_and_within_their_bound() {
    for_all_shapes("transposed", Kernels::available(), |k, rows, cols, block_size, g| {
        // More rows than a chunk, of a narrow matrix.
        let rows = if cols <= 96 { rows * 150 } else { rows };
        for kind in ["bell", "any bits", "sparse", "one NaN", "infinite"] {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            let x = inputs(kind, rows, g);
            for matrix in [q.plain(), q.nested()] {
                let run = |k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32]| {
                    let mut out = vec![3.0; cols];
                    k.gemv_transposed_f32(matrix, x, &mut out).unwrap();
                    out
                };
                let y = run(k, &matrix, &x);
                let what = format!("{rows} x {cols}, {block_size:?}, {kind}, {}", k.isa());
                if k != Kernels::scalar() {
                    assert_eq!(bits(&y), bits(&run(Kernels::scalar(), &matrix, &x)), "{what}");
                }
                // The sum of the chunks, each a view of its own.
                let chunk = |start: usize| {
                    let end = rows.min(start + spec::ROW_CHUNK);
                    run(k, &matrix.row_range(start..end).unwrap(), &x[start..end])
                };
                let mut sum = vec![0.0; cols];
                for start in (0..rows).step_by(spec::ROW_CHUNK) {
                    sum.iter_mut().zip(chunk(start)).for_each(|(sum, c)| *sum = f32::from_f32(*sum + c));
                }
                assert_eq!(bits(&sum), bits(&y), "chunks, {what}");
                if kind == "bell" {
                    let dense: Vec<_> = (0..rows).map(|r| Row::of(&matrix, &q.packed, r)).collect();
                    for (c, y) in y.iter().enumerate() {
                        truth::transposed(&dense, c, &x).check(*y, || format!("column {c}, {what}"));
                    }
                }
            }
        }
    });
}

#[test]
fn transposed_products_of_batches_have_the_bits_of_single_vectors() {
    for_all_shapes("transposed batches", Kernels::available(), |k, rows, cols, block_size, g| {
        let rows = if cols <= 96 { rows * 150 } else { rows };
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [0, 2, 7, 12, 65].into_iter().filter(|batch| *batch <= 7 || rows * cols <= 60_000) {
            let kind = KINDS[g.next() as usize % KINDS.len()];
            let x = inputs(kind, batch * rows, g);
            for matrix in [q.plain(), q.nested()] {
                let mut out = vec![3.0; batch * cols];
                k.gemm_transposed_f32(&matrix, &x, &mut out).unwrap();
                for n in 0..batch {
                    let mut expected = vec![3.0; cols];
                    Kernels::scalar().gemv_transposed_f32(&matrix, &x[n * rows..][..rows], &mut expected).unwrap();
                    let what =
                        || format!("vector {n} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
                    assert_eq!(bits(&out[n * cols..][..cols]), bits(&expected), "{}", what());
                }
            }
        }
    });
}
