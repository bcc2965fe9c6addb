//! Errors carry their numbers, and the panics of the infallible twins carry the errors.

use nf4::{
    AbsmaxBuf, Adapters, BackwardScratch, BlockSize, DYNAMIC_MAP, Error, LoRAAdapter, LoRALayer, LoRAScaling,
    MultiAdapterLayer, QLoRALayer, Quantized4Bit, Scratch, ShapeError, Tensor, f16,
};

use crate::{adapter, layer, normal};

fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    }
}

fn try_new(weight: Vec<f32>, rank: usize, alpha: f32) -> [Result<(), Error>; 2] {
    let weight = Tensor::from_vec(weight, false);
    [
        QLoRALayer::try_new(weight.clone(), 3, 64, rank, alpha).map(drop),
        LoRALayer::try_new(weight, 3, 64, rank, alpha).map(drop),
    ]
}

#[test]
fn of_constructors() {
    let good = vec![0.5; 192];
    let mut nan = good.clone();
    nan[70] = f32::NAN;
    let mut infinite = good.clone();
    infinite[191] = f32::NEG_INFINITY;
    let cases = [
        (vec![0.0; 191], 2, 1.0, "base weight: expected 3 x 64 values, got 191"),
        (good.clone(), 0, 1.0, "rank 0: an adapter needs a rank of at least 1"),
        (good.clone(), 2, f32::NAN, "alpha is NaN, which is not finite"),
        (good.clone(), 2, f32::INFINITY, "alpha is inf, which is not finite"),
        (nan, 2, 1.0, "base weight: value 70 is NaN, which is not finite"),
        (infinite, 2, 1.0, "base weight: value 191 is -inf, which is not finite"),
    ];
    for (weight, rank, alpha, expected) in cases {
        for result in try_new(weight, rank, alpha) {
            assert_eq!(message(result), expected);
        }
    }
    // More values than a `usize` counts, more bytes than it counts, and more bytes than a vector can have.
    for (rank, expected) in [
        (usize::MAX, format!("a matrix of {} x 64 elements does not fit in the address space", usize::MAX)),
        (usize::MAX / 64, "out of memory: a buffer would be larger than the address space".to_owned()),
        (usize::MAX / 512 + 1, format!("out of memory: there is no room for a buffer of {} bytes", usize::MAX / 2 + 1)),
    ] {
        for result in try_new(good.clone(), rank, 1.0) {
            assert_eq!(message(result), expected);
        }
    }
    let huge = QLoRALayer::try_new(Tensor::zeros(0, false), usize::MAX, 2, 1, 1.0);
    assert!(matches!(huge, Err(Error::Shape(ShapeError::Overflow { rows: usize::MAX, cols: 2 }))));
}

#[test]
fn of_adapters() {
    let new =
        |a: usize, b: usize| LoRAAdapter::from_parts(vec![0.0; a], vec![0.0; b], 3, 5, 2, 1.0, LoRAScaling::Standard);
    assert!(new(10, 6).is_ok());
    assert_eq!(message(new(9, 6)), "lora_a: expected 2 x 5 values, got 9");
    assert_eq!(message(new(10, 7)), "lora_b: expected 3 x 2 values, got 7");
    let b = vec![0.0, f32::INFINITY, 0.0];
    let alpha = |alpha| LoRAAdapter::from_parts(vec![0.0; 5], vec![0.0; 3], 3, 5, 1, alpha, LoRAScaling::Standard);
    assert_eq!(message(alpha(f64::NAN)), "alpha is NaN, which is not finite");
    assert_eq!(message(alpha(f64::NEG_INFINITY)), "alpha is -inf, which is not finite");
    assert_eq!(message(alpha(1e39)), format!("alpha {} gives a scale that is not finite", 1e39));
    let got = LoRAAdapter::from_parts(vec![0.0; 5], b, 3, 5, 1, 1.0, LoRAScaling::Standard);
    assert_eq!(message(got), "lora_b: value 1 is inf, which is not finite");
    let base = Quantized4Bit::quantize(&[0.0_f32; 15], 5, 3, BlockSize::B64, false).unwrap();
    assert_eq!(
        message(QLoRALayer::from_parts(base, new(10, 6).unwrap())),
        "the base is [d_out, d_in] = [5, 3], but the adapter was made for [3, 5]"
    );
}

#[test]
fn of_quantized_weights() {
    let mut weights = vec![f16::ONE; 128];
    weights[127] = f16::NAN;
    let got = Quantized4Bit::quantize(&weights, 2, 64, BlockSize::B64, true);
    assert_eq!(message(got), "base weight: value 127 is NaN, which is not finite");
    // Finite, but their mean is not.
    let got = Quantized4Bit::quantize(&[f32::MAX; 256], 2, 128, BlockSize::B64, true);
    assert_eq!(message(got), "absmax: value 0 is NaN, which is not finite");
    assert!(Quantized4Bit::quantize(&[f32::MAX; 256], 2, 128, BlockSize::B64, false).is_ok());

    let parts = |packed: usize, absmax| Quantized4Bit::from_parts(vec![0; packed], absmax, 2, 64, BlockSize::B64);
    assert!(parts(64, AbsmaxBuf::plain(vec![1.0; 2])).is_ok());
    let got = parts(63, AbsmaxBuf::plain(vec![1.0; 2]));
    assert_eq!(message(got), "packed codes: expected length 64, got 63");
    assert_eq!(message(parts(64, AbsmaxBuf::plain(vec![1.0; 3]))), "absmax: expected length 2, got 3");
    let got = parts(64, AbsmaxBuf::plain(vec![1.0, f32::NAN]));
    assert_eq!(message(got), "absmax: value 1 is NaN, which is not finite");
    let nested = AbsmaxBuf::nested(vec![0; 257], vec![1.0], &DYNAMIC_MAP, 0.0);
    assert_eq!(message(nested), "nested absmax: expected length 2, got 1");
    let nested = AbsmaxBuf::nested(vec![0; 2], vec![1.0], &DYNAMIC_MAP, f32::INFINITY).unwrap();
    assert_eq!(message(parts(64, nested)), "absmax: value 0 is inf, which is not finite");
}

/// Only rows without columns need no bytes, so that they can be more than there is memory for.
#[test]
fn of_memory() {
    let rows = usize::MAX / 4;
    let out_of_memory = |bytes: usize| format!("out of memory: there is no room for a buffer of {bytes} bytes");
    let overflow = out_of_memory(rows * 4);
    for nested in [false, true] {
        let absmax = if nested { AbsmaxBuf::double_quantize(&[]).unwrap() } else { AbsmaxBuf::plain(vec![]) };
        let base = Quantized4Bit::from_parts(vec![], absmax, rows, 0, BlockSize::B64).unwrap();
        assert_eq!((base.len(), base.memory_bytes()), (0, 0));
        let multi = MultiAdapterLayer::new(base.clone());
        assert_eq!(message(multi.try_forward(&Tensor::zeros(0, false), Adapters::Active)), overflow);
        let x = Tensor::zeros(5, false);
        let got = multi.try_forward(&x, Adapters::Active);
        assert_eq!(message(got), "a batch of vectors of 0 values cannot have 5");
        // An adapter has a `B` of as many rows.
        let adapter = LoRAAdapter::new(rows, 0, 1, 1.0, LoRAScaling::Standard, 0);
        assert_eq!(message(adapter), overflow);
    }
    let (mut forward, mut backward) = (Scratch::new(), BackwardScratch::new());
    assert_eq!(message(forward.reserve(rows, 64, BlockSize::B64, 1, 1)), overflow);
    assert_eq!(message(forward.reserve(3, rows, BlockSize::B64, 1, 1)), overflow);
    assert_eq!(message(backward.reserve(rows, 64, 0, 0)), overflow);
    assert_eq!(message(backward.reserve(64, rows, 0, 0)), overflow);
    // What a layer of the same number of inputs needs was taken; it can be used for one that fits.
    assert!(forward.reserve(3, 64, BlockSize::B64, 1, 1).is_ok());
    assert!(backward.reserve(3, 64, 1, 1).is_ok());
    let layer = layer(3, 64, 1, BlockSize::B64, false);
    layer.forward_into(&[0.0; 64], &mut forward, &mut [0.0; 3]).unwrap();
}

#[test]
#[should_panic(expected = "out of memory: there is no room for a buffer of")]
fn of_memory_by_a_panic() {
    let _ = layer(3, 64, 1, BlockSize::B64, false).scratch(usize::MAX / 512);
}

#[test]
fn of_forwards() {
    let layer = layer(3, 64, 2, BlockSize::B64, false);
    let x = Tensor::zeros(65, false);
    let ragged = "a batch of vectors of 64 values cannot have 65";
    assert_eq!(message(layer.try_forward(&x)), ragged);
    let lora = LoRALayer::from_parts(Tensor::zeros(192, false), adapter(3, 64, 2)).unwrap();
    assert_eq!(message(lora.try_forward(&x)), ragged);

    let (x, mut scratch) = ([0.0; 64], layer.scratch(1));
    assert_eq!(message(layer.forward_into(&x, &mut scratch, &mut [0.0; 2])), "output: expected length 3, got 2");
    assert_eq!(
        message(layer.forward_into(&x, &mut Scratch::new(), &mut [0.0; 3])),
        "scratch for activation values: expected length 64, got 0"
    );
    assert_eq!(message(layer.merge_rows_into(2..4, &mut [0.0_f32; 128])), "rows 2..4 do not lie in 0..3");
    let got = layer.merge_rows_into(1..2, &mut [0.0_f32; 65]);
    assert_eq!(message(got), "merged weights: expected length 64, got 65");
}

#[test]
fn of_biases() {
    let layer = layer(3, 64, 2, BlockSize::B64, false);
    let with_bias = |bias| layer.clone().with_bias(bias);
    assert_eq!(message(with_bias(vec![0.0; 2])), "bias: expected length 3, got 2");
    assert_eq!(message(with_bias(vec![0.0, 0.0, f32::NAN])), "bias: value 2 is NaN, which is not finite");
}

#[test]
fn of_batches() {
    let layer = layer(3, 64, 2, BlockSize::B64, false);
    let x = Tensor::zeros(130, false);
    assert_eq!(message(layer.try_forward(&x)), "a batch of vectors of 64 values cannot have 130");
    let (x, mut scratch) = ([0.0; 128], layer.scratch(2));
    assert_eq!(message(layer.forward_into(&x, &mut scratch, &mut [0.0; 5])), "output: expected length 6, got 5");
    assert_eq!(
        message(layer.forward_into(&x, &mut layer.scratch(1), &mut [0.0; 6])),
        "scratch for activation values: expected length 128, got 64"
    );
    let mut small = Scratch::new();
    small.reserve(3, 64, BlockSize::B64, 1, 2).unwrap();
    assert_eq!(
        message(layer.forward_into(&[f16::ONE; 128], &mut small, &mut [0.0_f32; 6])),
        "scratch for the low-rank product: expected length 4, got 2"
    );
}

#[test]
fn of_replaced_tensors() {
    let x = Tensor::zeros(64, false);
    let mut layer = layer(3, 64, 2, BlockSize::B64, false);
    *layer.lora_b_mut() = Tensor::zeros(5, true);
    assert_eq!(message(layer.try_forward(&x)), "lora_b: expected 3 x 2 values, got 5");
    assert_eq!(message(layer.merge_rows_into(1..2, &mut [0.0_f32; 64])), "lora_b: expected 3 x 2 values, got 5");
    *layer.lora_a_mut() = Tensor::zeros(129, true);
    assert_eq!(message(layer.try_forward(&x)), "lora_a: expected 2 x 64 values, got 129");
}

#[test]
#[should_panic(expected = "base weight: expected 3 x 64 values, got 100")]
fn new_panics_with_the_numbers() {
    let _ = QLoRALayer::new(Tensor::zeros(100, false), 3, 64, 2, 1.0);
}

#[test]
#[should_panic(expected = "a batch of vectors of 64 values cannot have 63")]
fn forward_panics_with_the_numbers() {
    let _ = layer(3, 64, 2, BlockSize::B64, false).forward(&Tensor::from_vec(normal(63, 1.0, 1), false));
}
