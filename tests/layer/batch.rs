//! Batches, and inputs and outputs in other types: the bits of single vectors.

use nf4::{Arithmetic, BlockSize, Float, QLoRALayer, Scratch, Tensor, bf16, f16};

use crate::forward::SHAPES;
use crate::{all_kernels, bits, layer, normal};

/// The outputs for each vector alone, one after the other.
fn one_by_one(layer: &QLoRALayer, x: &[f32]) -> Vec<f32> {
    x.chunks(layer.d_in()).flat_map(|x| layer.forward(&Tensor::from_vec(x.to_vec(), false)).into_vec()).collect()
}

#[test]
fn a_batch_has_the_bits_of_single_vectors() {
    let kernels = all_kernels();
    for (i, (d_out, d_in, rank)) in SHAPES.into_iter().enumerate() {
        for (block, arithmetic, batch) in [
            (BlockSize::B64, Arithmetic::SixteenByFour, 0),
            (BlockSize::B64, Arithmetic::SixteenByFour, 1),
            (BlockSize::B64, Arithmetic::SixteenByFour, 5),
            (BlockSize::B32, Arithmetic::SixteenByFour, 2),
            (BlockSize::B128, Arithmetic::SixteenByFour, 133),
            (BlockSize::B64, Arithmetic::EightByEight, 7),
            (BlockSize::B256, Arithmetic::EightByEight, 70),
            (BlockSize::B64, Arithmetic::F32, 3),
            (BlockSize::B32, Arithmetic::F32, 70),
        ] {
            let mut layer = layer(d_out, d_in, rank, block, i % 2 == 0).with_arithmetic(arithmetic);
            if i % 3 != 0 {
                layer = layer.with_bias(normal(d_out, 0.1, 5)).unwrap();
            }
            let x = normal(batch * d_in, 1.0, 6);
            let expected = one_by_one(&layer, &x);
            let x = Tensor::from_vec(x, false);
            for k in &kernels {
                layer = layer.with_kernels(*k);
                let y = layer.forward(&x);
                let name = format!("{d_out}x{d_in}, batch {batch}, {block:?}, {arithmetic:?}, {}", k.isa());
                assert_eq!(bits(y.data()), bits(&expected), "{name}");
            }
        }
    }
}

#[test]
fn a_bad_vector_leaves_its_neighbours_alone() {
    for arithmetic in Arithmetic::ALL {
        let mut layer = layer(5, 128, 3, BlockSize::B64, false).with_arithmetic(arithmetic);
        for k in all_kernels() {
            layer = layer.with_kernels(k);
            let mut x = normal(4 * 128, 1.0, 4);
            x[130] = f32::NAN;
            x[128 * 3 + 127] = f32::INFINITY;
            let y = layer.forward(&Tensor::from_vec(x.clone(), false));
            assert_eq!(bits(y.data()), bits(&one_by_one(&layer, &x)), "{}", k.isa());
            assert!(y.data()[..5].iter().chain(&y.data()[10..15]).all(|y| y.is_finite()));
            assert_eq!(bits(&y.data()[5..10]), [f32::NAN.to_bits(); 5]);
        }
    }
}

#[test]
fn a_scratch_serves_smaller_batches_and_leaves_nothing_behind() {
    let layer = layer(150, 128, 3, BlockSize::B64, false);
    let mut scratch = layer.scratch(9);
    assert_eq!(scratch.memory_bytes(), Scratch::bytes(150, 128, BlockSize::B64, 3, 9));
    // As documented: 4 + 2 bytes for each of 128 inputs, 4 for each of 4 groups, of 3 ranks and of 150 outputs; 9 times.
    assert_eq!(scratch.memory_bytes(), 9 * (6 * 128 + 4 * (4 + 3 + 150)));
    for batch in [9, 2, 1, 0, 8] {
        let x = normal(batch * 128, 1.0, 4);
        let mut y = vec![f32::NAN; batch * 150];
        layer.forward_into(&x, &mut scratch, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&one_by_one(&layer, &x)), "{batch}");
    }
    assert_eq!(Scratch::bytes(1, 1 << 20, BlockSize::B64, 8, usize::MAX), usize::MAX);
}

/// Inputs and outputs of any two types: what f32 gives for the converted inputs, rounded once.
fn check_types<X: Float, Y: Float>() {
    for (d_out, d_in, rank) in SHAPES {
        for arithmetic in Arithmetic::ALL {
            let layer = layer(d_out, d_in, rank, BlockSize::B64, true).with_arithmetic(arithmetic);
            let layer = layer.with_bias(normal(d_out, 0.1, 5)).unwrap();
            for batch in [1, 3] {
                let x: Vec<X> = normal(batch * d_in, 1.0, 6).into_iter().map(X::from_f32).collect();
                let expected = one_by_one(&layer, &x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
                let mut y = vec![Y::from_f32(f32::NAN); batch * d_out];
                let mut scratch = layer.scratch(batch);
                assert_eq!(scratch.memory_bytes(), Scratch::bytes(d_out, d_in, BlockSize::B64, rank, batch));
                layer.forward_into(&x, &mut scratch, &mut y).unwrap();
                for (y, e) in y.iter().zip(expected) {
                    assert_eq!(y.to_f32().to_bits(), Y::from_f32(e).to_f32().to_bits());
                }
            }
        }
    }
}

#[test]
fn inputs_and_outputs_in_other_types() {
    check_types::<f32, f32>();
    check_types::<f16, f16>();
    check_types::<bf16, bf16>();
    check_types::<bf16, f32>();
    check_types::<f32, f16>();
}
