//! Lengths that overflow where addresses have 32 bits: `tests/wasm` runs this too.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

use nf4::{Arithmetic, BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor};

/// Columns of which 512 rows, the chunk that sums of rows are cut into, are 2^32 elements.
#[test]
fn gradients_of_very_long_rows() {
    let cols = 1 << 23;
    let weight: Vec<f32> = (0..cols).map(|i| (i % 7) as f32 - 3.0).collect();
    let base = Quantized4Bit::quantize(&weight, 1, cols, BlockSize::B4096, true).unwrap();
    drop(weight);
    let adapter = LoRAAdapter::from_parts(vec![0.5; cols], vec![2.0], 1, cols, 1, 1.0, LoRAScaling::Standard).unwrap();
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap();
    let x = Tensor::from_vec((0..cols).map(|i| (i % 5) as f32).collect(), false);
    // Node faults on more memory than one of them takes.
    let arithmetics = if cfg!(target_arch = "wasm32") { &Arithmetic::ALL[..1] } else { &Arithmetic::ALL[..] };
    for &arithmetic in arithmetics {
        layer = layer.with_arithmetic(arithmetic);
        layer.zero_grad();
        let dx = layer.backward(&x, &Tensor::from_vec(vec![1.0], false));
        // dA = B dy x, and dx = dy W + dy B A.
        for (i, (grad, x)) in layer.lora_a().grad().unwrap().iter().zip(x.data()).enumerate() {
            assert_eq!(*grad, 2.0 * x, "dA of column {i}");
        }
        let mut row = vec![0.0_f32; cols];
        layer.base_weight_quantized().dequantize_rows(0..1, &mut row).unwrap();
        // The transposed 16x4 product rounds weights to steps of their largest.
        let largest = row.iter().fold(0.0_f32, |largest, w| largest.max(w.abs()));
        let bound = if arithmetic == Arithmetic::F32 { 0.0 } else { largest / 16382.0 + 1e-6 };
        for (i, (dx, w)) in dx.data().iter().zip(&row).enumerate() {
            assert!((dx - (w + 1.0)).abs() <= bound, "dx of column {i}: {dx}, with a weight of {w}");
        }
    }
}
