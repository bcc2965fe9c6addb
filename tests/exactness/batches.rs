//! The 16x4 and the f32 product of a batch: the bits of its vectors.

use nf4::{Activations, BlockSize, Kernels};

use crate::generator::Generator;
use crate::{ActivationBuffers, KINDS, Quantized, bits, every, for_all_shapes, gemv, gemv_f32, inputs};

/// The columns of a product with a batch have the bits of the products with its vectors.
fn check_batch(k: Kernels, q: &Quantized, batch: usize, g: &mut Generator) {
    let Quantized { rows, cols, block_size, .. } = *q;
    let kind = KINDS[g.next() as usize % KINDS.len()];
    let x: Vec<f32> = (0..batch).flat_map(|_| inputs(kind, cols, g)).collect();
    let (values, scales) = (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
    let (mut values, mut scales) = (vec![0x5555; batch * values], vec![9.0; batch * scales]);
    let activations = k.quantize_activations_batch(&x, cols, block_size, &mut values, &mut scales).unwrap();
    for matrix in [q.plain(), q.nested()] {
        let (mut fast, mut exact) = (vec![3.0; rows * batch], vec![3.0; rows * batch]);
        k.gemm(&matrix, &activations, &mut fast).unwrap();
        k.gemm_f32(&matrix, &x, &mut exact).unwrap();
        for n in 0..batch {
            let column = |y: &[f32]| bits(&(0..rows).map(|r| y[r * batch + n]).collect::<Vec<_>>());
            let what = || format!("vector {n} of {batch}, {kind}, {rows} x {cols}, {block_size:?}, {}", k.isa());
            let vector = activations.vector(n);
            let mut buffers = ActivationBuffers::new(cols, block_size);
            let single = buffers.quantize(Kernels::scalar(), vector.inputs(), block_size);
            assert_eq!(column(&fast), bits(&gemv(Kernels::scalar(), &matrix, &single)), "16x4 {}", what());
            let single = gemv_f32(Kernels::scalar(), &matrix, vector.inputs());
            assert_eq!(column(&exact), bits(&single), "f32 {}", what());
        }
    }
}

#[test]
fn batches_give_the_bits_of_single_vectors() {
    for_all_shapes("batches", Kernels::available(), |k, rows, cols, block_size, g| {
        let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
        for batch in [0, 1, 2, 3, 7, 8, 131].into_iter().filter(|_| cols > 0) {
            if batch <= 8 || rows * cols <= 5000 {
                check_batch(k, &q, batch, g);
            }
        }
    });
}

/// More rows than a tile has with eight vectors down to two, and with one.
#[test]
fn batches_give_the_bits_of_single_vectors_over_all_tiles() {
    let g = &mut Generator(11);
    for k in Kernels::available() {
        for (rows, cols, block_size, batches) in
            [(520, 64, BlockSize::B64, 2..=8), (300, 96, BlockSize::B32, 4..=4), (1030, 32, BlockSize::B32, 1..=1)]
        {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            batches.for_each(|batch| check_batch(k, &q, batch, g));
        }
    }
}

/// Panels of decoded weights, one and several in each direction: partial ones of rows, of spans and of vectors, and the
/// last half span of blocks of 32.
#[test]
fn batches_give_the_bits_of_single_vectors_over_all_panels() {
    let g = &mut Generator(12);
    for k in Kernels::available() {
        let shapes = [
            (40, 544, BlockSize::B32),
            (1, 64, BlockSize::B64),
            (7, 1024, BlockSize::B64),
            (8, 1088, BlockSize::B64),
            (9, 1056, BlockSize::B32),
            (40, 576, BlockSize::B64),
            (70, 1088, BlockSize::B64),
            // Rows that are missing in a panel, which others stand in for.
            (62, 576, BlockSize::B64),
            (17, 2080, BlockSize::B32),
            (16, 2048, BlockSize::B128),
            (70, 1024, BlockSize::B256),
            // Blocks that straddle rows, with a last half span and with two panels of the f32 product.
            (37, 352, BlockSize::B256),
            (18, 4192, BlockSize::B128),
        ];
        for (rows, cols, block_size) in shapes.into_iter().step_by(every().min(5)) {
            let q = Quantized::new(k, &inputs("bell", rows * cols, g), rows, cols, block_size);
            [12, 31, 32, 64, 67].into_iter().step_by(every().min(4)).for_each(|batch| check_batch(k, &q, batch, g));
        }
        println!("panels on {}", k.isa());
    }
}
