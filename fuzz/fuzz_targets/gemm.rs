//! Batches: on every instruction set each output has the bits that the product of its vector alone has in scalar code; also
//! where one scale, or one input, is a value that arithmetic treats unlike others.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::Kernels;
use nf4_fuzz::products::{PRODUCTS, of_batch, of_vector};
use nf4_fuzz::{Bytes, Matrix, Poison, Product, bits};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    product: Product,
    batch: u8,
    poison: Poison,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let batch = usize::from(input.batch) % 40;
    let mut bytes = Bytes::new(input.bytes);
    let (mut x, mut matrix) = input.product.take(1 << 12, batch, &mut bytes);
    // Without inputs a batch cannot be counted.
    let batch = if matrix.cols == 0 { 0 } else { batch };
    let mut t = input.product.inputs.take(batch * matrix.rows, &mut bytes);
    check(&matrix, batch, &x, &t);

    let poison = input.poison;
    if let Some(value) = poison.value()
        && !x.is_empty()
        && matrix.rows > 0
    {
        let (row, column, vector) = (poison.row(matrix.rows), poison.column(matrix.cols), poison.vector(batch));
        let clean = (x.clone(), t.clone());
        x[vector * matrix.cols + column] = value;
        t[vector * matrix.rows + row] = value;
        check(&matrix, batch, &x, &t);
        matrix.poison(row, column, value);
        check(&matrix, batch, &clean.0, &clean.1);
    }
});

/// Compares all products of a batch with those of each vector in scalar code.
fn check(matrix: &Matrix, batch: usize, x: &[f32], t: &[f32]) {
    let (rows, cols, view) = (matrix.rows, matrix.cols, matrix.view());
    let mut expected = [rows, rows, rows, cols, cols].map(|len| vec![0.0; len * batch]);
    for n in 0..batch {
        let alone = of_vector(Kernels::scalar(), &view, &x[n * cols..][..cols], &t[n * rows..][..rows]);
        for (all, alone) in expected[..3].iter_mut().zip(&alone) {
            (0..rows).for_each(|r| all[r * batch + n] = alone[r]);
        }
        for (all, alone) in expected[3..].iter_mut().zip(&alone[3..]) {
            all[n * cols..][..cols].copy_from_slice(alone);
        }
    }
    for k in Kernels::available() {
        for ((got, expected), name) in of_batch(k, &view, batch, x, t).iter().zip(&expected).zip(PRODUCTS) {
            assert_eq!(bits(got), bits(expected), "{name}, batch {batch}, {}", k.isa());
        }
    }
}
