//! Lengths that overflow where addresses have 32 bits: `tests/wasm` runs this too.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

use nf4::{
    Absmax, Arithmetic, BlockSize, Gradients, Kernels, LoRAAdapter, LoRAScaling, Nf4Matrix, QLoRALayer, Quantized4Bit,
    Tensor,
};

/// Columns of which 512 rows, the chunk that sums of rows are cut into, are 2^32 elements.
const COLS: usize = 1 << 23;

#[test]
fn gradients_of_very_long_rows() {
    let cols = COLS;
    let weight: Vec<f32> = (0..cols).map(|i| (i % 7) as f32 - 3.0).collect();
    let base = Quantized4Bit::quantize(&weight, 1, cols, BlockSize::B4096, true).unwrap();
    drop(weight);
    let adapter = LoRAAdapter::from_parts(vec![0.5; cols], vec![2.0], 1, cols, 1, 1.0, LoRAScaling::Standard).unwrap();
    // The only arithmetic in which gradients are exact.
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap().with_arithmetic(Arithmetic::F32);
    let x = Tensor::from_vec((0..cols).map(|i| (i % 5) as f32).collect(), false);
    let dx = layer.backward(&x, &Tensor::from_vec(vec![1.0], false));
    // dA = B dy x, and dx = dy W + dy B A.
    for (i, (grad, x)) in layer.lora_a().grad().unwrap().iter().zip(x.data()).enumerate() {
        assert_eq!(*grad, 2.0 * x, "dA of column {i}");
    }
    let mut row = vec![0.0_f32; cols];
    layer.base_weight_quantized().dequantize_rows(0..1, &mut row).unwrap();
    for (i, (dx, w)) in dx.data().iter().zip(&row).enumerate() {
        assert_eq!(*dx, w + 1.0, "dx of column {i}");
    }
}

#[test]
fn integer_gradients_of_very_long_rows() {
    // All weights are 1, times an absmax that differs from block to block.
    let (packed, absmax): (_, Vec<f32>) = (vec![0xff; COLS / 2], (1_u16..=2048).map(f32::from).collect());
    let matrix = Nf4Matrix::new(&packed, Absmax::Plain(&absmax), 1, COLS, BlockSize::B4096).unwrap();
    let mut out = vec![f32::NAN; COLS];
    for k in Kernels::available() {
        let (mut values, mut scales) = ([0; Gradients::values_len(1)], [0.0; Gradients::scales_len(1)]);
        let gradients = k.quantize_gradients(&[0.5], 1, &mut values, &mut scales).unwrap();
        k.gemm_transposed(&matrix, &gradients, &mut out).unwrap();
        for (block, absmax) in out.chunks(4096).zip(&absmax) {
            assert!(block.iter().all(|y| (y / absmax - 0.5).abs() < 1e-6), "absmax {absmax}, {}", k.isa());
        }
    }
}
