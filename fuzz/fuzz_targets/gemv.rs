//! Products of one vector: every instruction set gives the bits of scalar code, whatever the split by rows, and they
//! lie within the bounds of the specification of the product in f64.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::{Kernels, Nf4Matrix};
use nf4_fuzz::{ActivationBuffers, Bytes, Product, bits, check_dense, others};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    product: Product,
    /// Where the matrix is split.
    split: u16,
    bytes: &'a [u8],
}

/// The 16x4, the f32 and the transposed product.
fn products(k: Kernels, matrix: &Nf4Matrix<'_>, x: &[f32], t: &[f32]) -> [Vec<f32>; 3] {
    let mut buffers = ActivationBuffers::new(1, matrix.cols(), matrix.block_size());
    let activations = buffers.quantize(k, x);
    let (mut fast, mut exact) = (vec![3.0; matrix.rows()], vec![3.0; matrix.rows()]);
    let mut transposed = vec![3.0; matrix.cols()];
    k.gemv(matrix, &activations, &mut fast).expect("the lengths fit");
    k.gemv_f32(matrix, x, &mut exact).expect("the lengths fit");
    k.gemv_transposed_f32(matrix, t, &mut transposed).expect("the lengths fit");
    [fast, exact, transposed]
}

fuzz_target!(|input: Input<'_>| {
    let mut bytes = Bytes::new(input.bytes);
    let (x, matrix) = input.product.take(1 << 14, 1, &mut bytes);
    let (rows, cols) = (matrix.rows, matrix.cols);
    let t = input.product.inputs.take(rows, &mut bytes);
    let view = matrix.view();

    let scalar = Kernels::scalar();
    let expected = products(scalar, &view, &x, &t);
    let mut buffers = ActivationBuffers::new(1, cols, matrix.block_size);
    matrix.check_gemv(&buffers.quantize(scalar, &x), &expected[0]);
    matrix.check_gemv_f32(&x, &expected[1]);
    matrix.check_transposed(&t, &expected[2]);
    for k in others() {
        for (y, e) in products(k, &view, &x, &t).iter().zip(&expected) {
            assert_eq!(bits(y), bits(e), "{} and scalar", k.isa());
        }
    }

    let row = usize::from(input.split) % (rows + 1);
    let (top, bottom) = view.split_at_row(row).expect("row <= rows");
    for k in Kernels::available() {
        let (top, bottom) = (products(k, &top, &x, &t[..row]), products(k, &bottom, &x, &t[row..]));
        for p in 0..2 {
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
