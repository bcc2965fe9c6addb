//! Forwards.

use nf4::{Arithmetic, BlockSize, LoRALayer, QLoRALayer, Scratch, Tensor};

use crate::{adapter, all_kernels, bits, layer, normal, truth};

/// `[d_out, d_in]`, rank: one of each, odd rows (which start in the middle of a byte), rows that straddle blocks, whole
/// blocks, ranks larger than a block and than the layer, more rows than a forward finishes at a time.
pub(crate) const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (3, 2, 5),
    (5, 63, 2),
    (7, 65, 3),
    (4, 64, 1),
    (9, 96, 8),
    (40, 33, 4),
    (6, 128, 100),
    (33, 192, 16),
    (5, 1024, 7),
    (12, 384, 64),
    (3, 4096, 9),
    (1, 8192, 1),
    (261, 64, 2),
];

#[test]
fn forward_is_near_f64_with_the_same_bits_on_every_instruction_set() {
    let kernels = all_kernels();
    for (d_out, d_in, rank) in SHAPES {
        for block in BlockSize::ALL {
            for double_quant in [false, true] {
                let name = format!("{d_out}x{d_in}, rank {rank}, block {}, dq {double_quant}", block.get());
                let mut layer = layer(d_out, d_in, rank, block, double_quant);
                assert_eq!((layer.bias(), layer.arithmetic()), (None, Arithmetic::SixteenByFour));
                if double_quant {
                    layer = layer.with_bias(normal(d_out, 0.3, 5)).unwrap();
                }
                let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
                for arithmetic in Arithmetic::ALL {
                    let name = format!("{name}, {arithmetic:?}");
                    layer = layer.with_arithmetic(arithmetic);
                    let expected = layer.forward(&x);
                    truth::check(&name, &truth::forward(&layer, x.data()), expected.data());
                    for k in &kernels {
                        layer = layer.with_kernels(*k);
                        assert_eq!(layer.kernels(), *k);
                        assert_eq!(bits(layer.forward(&x).data()), bits(expected.data()), "{name}, {}", k.isa());
                    }
                }
            }
        }
    }
}

#[test]
fn a_dense_layer_is_near_f64() {
    for (d_out, d_in, rank) in SHAPES {
        let weight = normal(d_out * d_in, 0.02, 1);
        let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
        let mut expected: Vec<truth::Output> =
            weight.chunks(d_in).map(|w| truth::products::dense(w, x.data()).into()).collect();
        let layer = LoRALayer::from_parts(Tensor::from_vec(weight, false), adapter(d_out, d_in, rank)).unwrap();
        truth::add_adapter(layer.adapter(), x.data(), &mut expected);
        truth::check(&format!("{d_out}x{d_in}, rank {rank}"), &expected, layer.forward(&x).data());
    }
}

#[test]
fn a_fresh_adapter_adds_nothing() {
    let (d_out, d_in) = (6, 128);
    let layer = QLoRALayer::new(Tensor::from_vec(normal(d_out * d_in, 0.02, 1), false), d_out, d_in, 8, 16.0);
    let x = normal(d_in, 1.0, 4);
    let block = layer.base_weight_quantized().block_size();
    let (mut values, mut scales, mut base) = ([0; 128], [0.0; 2], [0.0; 6]);
    let activations = layer.kernels().quantize_activations(&x, block, &mut values, &mut scales).unwrap();
    layer.kernels().gemv(&layer.base_weight_quantized().view(), &activations, &mut base).unwrap();
    assert_eq!(layer.forward(&Tensor::from_vec(x, false)).data(), base);
}

#[test]
fn one_scratch_serves_layers_of_every_shape() {
    let mut scratch = Scratch::new();
    assert_eq!(scratch.memory_bytes(), 0);
    for (d_out, d_in, rank) in SHAPES {
        let layer = layer(d_out, d_in, rank, BlockSize::B64, true);
        let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
        scratch.reserve(d_out, d_in, BlockSize::B64, rank, 1).unwrap();
        let mut y = vec![f32::NAN; d_out];
        layer.forward_into(x.data(), &mut scratch, &mut y).unwrap();
        assert_eq!(bits(&y), bits(layer.forward(&x).data()), "{d_out}x{d_in}, rank {rank}");
    }
    // As documented: 4 + 2 bytes for each of 8192 inputs, 4 for each of 256 groups, of 100 ranks and of 261 outputs.
    assert_eq!(scratch.memory_bytes(), 6 * 8192 + 4 * (256 + 100 + 261));
}

#[test]
fn layers_without_inputs_or_outputs() {
    for (d_out, d_in) in [(0, 64), (4, 0), (0, 0)] {
        for arithmetic in Arithmetic::ALL {
            for double_quant in [false, true] {
                let layer = layer(d_out, d_in, 2, BlockSize::B64, double_quant).with_arithmetic(arithmetic);
                assert_eq!(layer.forward(&Tensor::zeros(d_in, false)).data(), vec![0.0; d_out]);
                assert!(layer.merge_to_f32().is_empty());
                let layer = layer.with_bias(vec![0.5; d_out]).unwrap();
                assert_eq!(layer.forward(&Tensor::zeros(d_in, false)).data(), vec![0.5; d_out]);
                let (x, mut y) = (vec![0.0; 3 * d_in], vec![0.0; 3 * d_out]);
                layer.forward_into(&x, &mut layer.scratch(3), &mut y).unwrap();
                assert_eq!(y, vec![0.5; 3 * d_out]);
            }
        }
    }
}

#[test]
fn every_arithmetic_has_its_precision() {
    let (d_out, d_in) = (64, 1024);
    let mut layer = layer(d_out, d_in, 4, BlockSize::B64, true);
    let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
    let exact = truth::forward(&layer, x.data());
    let mut largest_error = |arithmetic| {
        layer = layer.clone().with_arithmetic(arithmetic);
        let y = layer.forward(&x);
        let errors = y.data().iter().zip(&exact).map(|(y, e)| (f64::from(*y) - e.exact).abs());
        errors.reduce(f64::max).unwrap()
    };
    let [coarse, coarsest, fine] = Arithmetic::ALL.map(&mut largest_error);
    // An input of magnitude 1 is kept to 2^-14, 2^-8 and 2^-24.
    assert!(fine * 10.0 < coarse && coarse * 10.0 < coarsest, "16x4 {coarse}, 8x8 {coarsest}, f32 {fine}");
}

#[test]
fn a_nan_or_infinite_input_shows_in_every_output() {
    for d_in in [128, 96] {
        for k in all_kernels() {
            let layer = layer(5, d_in, 3, BlockSize::B64, false).with_kernels(k);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let mut x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
                x.data_mut()[17] = bad;
                let y = layer.forward(&x);
                assert!(y.data().iter().all(|y| !y.is_finite()), "{}: {:?}", k.isa(), y.data());
                if bad.is_nan() {
                    assert_eq!(bits(y.data()), [f32::NAN.to_bits(); 5]);
                }
            }
        }
    }
}
