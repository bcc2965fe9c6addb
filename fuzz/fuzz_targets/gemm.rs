//! Batches: on every instruction set each output has the bits that the product of its vector alone has in scalar code.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::Kernels;
use nf4_fuzz::{ActivationBuffers, Bytes, Product, bits};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    product: Product,
    batch: u8,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let batch = usize::from(input.batch) % 40;
    let (x, matrix) = input.product.take(1 << 12, batch, &mut Bytes::new(input.bytes));
    let (rows, cols, view) = (matrix.rows, matrix.cols, matrix.view());
    // Without inputs a batch cannot be counted.
    let batch = if cols == 0 { 0 } else { batch };

    let scalar = Kernels::scalar();
    let (mut fast, mut exact) = (vec![3.0; rows * batch], vec![3.0; rows * batch]);
    for n in 0..batch {
        let x = &x[n * cols..][..cols];
        let (mut y, mut z) = (vec![3.0; rows], vec![3.0; rows]);
        let mut buffers = ActivationBuffers::new(1, cols, matrix.block_size);
        let activations = buffers.quantize(scalar, x);
        scalar.gemv(&view, &activations, &mut y).expect("the lengths fit");
        scalar.gemv_f32(&view, x, &mut z).expect("the lengths fit");
        for r in 0..rows {
            (fast[r * batch + n], exact[r * batch + n]) = (y[r], z[r]);
        }
    }
    for k in Kernels::available() {
        let mut buffers = ActivationBuffers::new(batch, cols, matrix.block_size);
        let activations = buffers.quantize(k, &x);
        assert_eq!(activations.batch(), batch);
        let (mut y, mut z) = (vec![4.0; rows * batch], vec![4.0; rows * batch]);
        k.gemm(&view, &activations, &mut y).expect("the lengths fit");
        k.gemm_f32(&view, &x, &mut z).expect("the lengths fit");
        assert_eq!(bits(&y), bits(&fast), "16x4, batch {batch}, {}", k.isa());
        assert_eq!(bits(&z), bits(&exact), "f32, batch {batch}, {}", k.isa());
    }
});
