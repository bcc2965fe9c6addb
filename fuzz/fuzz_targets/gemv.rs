//! Products of one vector: every instruction set gives the bits of scalar code, whatever the split by rows, and they
//! lie within the bounds of the specification of the product in f64.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::Kernels;
use nf4_fuzz::products::{PRODUCTS, of_vector, quantized, quantized_8x8};
use nf4_fuzz::{Bytes, Product, bits, check_dense, others};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    product: Product,
    /// Where the matrix is split.
    split: u16,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let mut bytes = Bytes::new(input.bytes);
    // Room for more rows than a chunk of the transposed products, of 32 columns.
    let (x, matrix) = input.product.take(18 << 10, 1, &mut bytes);
    let (rows, cols) = (matrix.rows, matrix.cols);
    let t = input.product.inputs.take(rows, &mut bytes);
    let view = matrix.view();

    let scalar = Kernels::scalar();
    let expected = of_vector(scalar, &view, &x, &t);
    quantized(scalar, &view, &x, |x| matrix.check_gemv(x, &expected[0]));
    quantized_8x8(scalar, cols, &x, |x| matrix.check_gemv_8x8(x, &expected[1]));
    matrix.check_gemv_f32(&x, &expected[2]);
    matrix.check_transposed(&t, &expected[3], &expected[4]);
    for k in others() {
        for ((y, e), name) in of_vector(k, &view, &x, &t).iter().zip(&expected).zip(PRODUCTS) {
            assert_eq!(bits(y), bits(e), "{name}, {} and scalar", k.isa());
        }
    }

    let row = usize::from(input.split) % (rows + 1);
    let (top, bottom) = view.split_at_row(row).expect("row <= rows");
    for k in Kernels::available() {
        let (top, bottom) = (of_vector(k, &top, &x, &t[..row]), of_vector(k, &bottom, &x, &t[row..]));
        for p in 0..3 {
            assert_eq!(bits(&[&*top[p], &*bottom[p]].concat()), bits(&expected[p]), "split at {row}, {}", k.isa());
        }
    }

    let a = input.product.inputs.take(rows * cols, &mut bytes);
    let dense = |k: Kernels| {
        let (mut y, mut z) = (vec![3.0; rows], expected[0].clone());
        k.gemv_dense(&a, &x, &mut y).expect("the lengths fit");
        k.gemv_dense_add(&a, &x, 0.75, &mut z).expect("the lengths fit");
        (y, z)
    };
    let (y, z) = dense(scalar);
    for (r, y) in y.iter().enumerate() {
        check_dense(&a[r * cols..][..cols], &x, *y);
    }
    for k in others() {
        let (other, added) = dense(k);
        assert_eq!((bits(&other), bits(&added)), (bits(&y), bits(&z)), "dense, {} and scalar", k.isa());
    }
});
