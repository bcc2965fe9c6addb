//! Merged weights.

use nf4::{BlockSize, Float, LoRAAdapter, LoRALayer, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor, bf16, f16};

use crate::{adapter, all_kernels, bits, layer, normal};

/// `weight + scale * B A` in f64, in the order of the rank, rounded once.
fn merged(weight: &[f32], adapter: &LoRAAdapter) -> Vec<f32> {
    let (a, b, rank, d_in) = (adapter.a().data(), adapter.b().data(), adapter.rank(), adapter.d_in());
    let delta = |i: usize| -> f64 {
        let (row, column) = (i / d_in, i % d_in);
        (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * d_in + column])).sum()
    };
    let exact = |(i, w): (usize, &f32)| f64::from(*w) + f64::from(adapter.scale()) * delta(i);
    #[allow(clippy::cast_possible_truncation, reason = "rounding is meant")]
    weight.iter().enumerate().map(|w| exact(w) as f32).collect()
}

#[test]
fn merge_to_f32_is_the_f64_sum_rounded_once() {
    let kernels = all_kernels();
    for (d_out, d_in, rank) in [(1, 1, 1), (5, 63, 2), (6, 128, 100), (9, 96, 8), (3, 200, 300)] {
        for double_quant in [false, true] {
            let layer = layer(d_out, d_in, rank, BlockSize::B32, double_quant);
            let expected = merged(&layer.base_weight_quantized().dequantize(), layer.adapter());
            for k in &kernels {
                let got = layer.clone().with_kernels(*k).merge_to_f32();
                assert_eq!(bits(&got), bits(&expected), "{d_out}x{d_in}, rank {rank}, {}", k.isa());
            }
            for row in 0..d_out {
                let mut part = vec![0.0_f32; d_in];
                layer.merge_rows_into(row..row + 1, &mut part).unwrap();
                assert_eq!(bits(&part), bits(&expected[row * d_in..][..d_in]), "row {row}");
            }
        }
    }
}

/// Rows of the merged weight in `T`: those of f32, rounded once.
fn check_type<T: Float>(layer: &QLoRALayer) {
    let (d_out, d_in) = (layer.d_out(), layer.d_in());
    let expected = layer.merge_to_f32();
    for rows in [0..d_out, 1..1, 1..2, d_out - 1..d_out, 0..d_out / 2] {
        let mut out = vec![T::from_f32(f32::NAN); rows.len() * d_in];
        layer.merge_rows_into(rows.clone(), &mut out).unwrap();
        for (got, e) in out.iter().zip(&expected[rows.start * d_in..]) {
            assert_eq!(got.to_f32().to_bits(), T::from_f32(*e).to_f32().to_bits());
        }
    }
}

#[test]
fn rows_are_merged_in_every_type() {
    for (d_out, d_in) in [(5, 63), (4, 128)] {
        for k in all_kernels() {
            let layer = layer(d_out, d_in, 3, BlockSize::B64, true).with_kernels(k);
            check_type::<f32>(&layer);
            check_type::<f16>(&layer);
            check_type::<bf16>(&layer);
        }
    }
}

#[test]
fn a_requantized_merge_is_the_quantized_merged_weight() {
    // Rows of whole blocks, rows that straddle them, rows shorter than a block, odd sizes, and none.
    for (d_out, d_in) in [(4, 128), (7, 96), (300, 3), (5, 63), (1, 1), (0, 64), (3, 0)] {
        for block in [BlockSize::B32, BlockSize::B64, BlockSize::B4096] {
            for double_quant in [false, true] {
                let name = format!("{d_out}x{d_in}, {block:?}, dq {double_quant}");
                let layer = layer(d_out, d_in, 3, BlockSize::B64, false);
                let merged = layer.merge_to_f32();
                let expected = Quantized4Bit::quantize(&merged, d_out, d_in, block, double_quant).unwrap();
                let (mut max, [mut error, mut weight, mut change]) = (0.0_f64, [0.0_f64; 3]);
                let (after, before) = (expected.dequantize::<f32>(), layer.base_weight_quantized().dequantize::<f32>());
                for ((m, q), w) in merged.iter().zip(after).zip(before) {
                    let [m, q, w] = [*m, q, w].map(f64::from);
                    max = max.max((q - m).abs());
                    error += (q - m).powi(2);
                    weight += m * m;
                    change += (m - w).powi(2);
                }
                let [error, weight, change] = [error, weight, change].map(|s| (s / merged.len().max(1) as f64).sqrt());
                for k in all_kernels() {
                    let (got, report) = layer.clone().with_kernels(k).merge_requantized(block, double_quant).unwrap();
                    assert_eq!(got.packed(), expected.packed(), "{name}, {}", k.isa());
                    assert_eq!(bits(&got.dequantize()), bits(&expected.dequantize()), "{name}, {}", k.isa());
                    assert_eq!((got.block_size(), got.is_double_quantized()), (block, double_quant));
                    assert_eq!(report.max_abs_error, max);
                    // The same sums in the same order.
                    assert_eq!([report.rms_error, report.rms_merged, report.rms_change], [error, weight, change]);
                    assert!(merged.is_empty() || report.relative() == error / weight);
                }
            }
        }
    }
}

#[test]
fn a_requantized_merge_has_the_magnitudes_of_dora() {
    let magnitude = normal(5, 1.0, 9);
    let base = Quantized4Bit::quantize(&normal(5 * 96, 0.02, 1), 5, 96, BlockSize::B64, false).unwrap();
    let layer = QLoRALayer::from_parts(base, adapter(5, 96, 3).with_magnitude(magnitude).unwrap()).unwrap();
    let expected = Quantized4Bit::quantize(&layer.merge_to_f32(), 5, 96, BlockSize::B32, true).unwrap();
    let (got, _) = layer.merge_requantized(BlockSize::B32, true).unwrap();
    assert_eq!(bits(&got.dequantize()), bits(&expected.dequantize()));
}

#[test]
fn a_requantized_merge_shows_that_a_small_adapter_is_lost() {
    let base = Quantized4Bit::quantize(&normal(64 * 256, 0.02, 1), 64, 256, BlockSize::B64, false).unwrap();
    // A change of 1e-5 where the step of NF4 is above 1e-3.
    let small = LoRAAdapter::from_parts(vec![1e-5; 256], vec![1.0; 64], 64, 256, 1, 1.0, LoRAScaling::Standard);
    let layer = QLoRALayer::from_parts(base, small.unwrap()).unwrap();
    let (requantized, error) = layer.merge_requantized(BlockSize::B64, false).unwrap();
    assert_eq!(requantized.packed(), layer.base_weight_quantized().packed());
    assert!((error.rms_change / 1e-5 - 1.0).abs() < 1e-3, "{error:?}");
    assert!(error.rms_error > error.rms_change / 2.0, "{error:?}");
}

#[test]
fn a_merge_that_is_not_finite_is_not_quantized() {
    let mut layer = layer(4, 64, 2, BlockSize::B64, false);
    layer.lora_b_mut().data_mut()[2 * 2] = f32::INFINITY;
    let error = layer.merge_requantized(BlockSize::B64, false).unwrap_err().to_string();
    // The sign is that of `A`.
    assert!(error.starts_with("merged weight: value 128 is") && error.ends_with("inf, which is not finite"), "{error}");
}

#[test]
fn unmerge_restores_every_bit() {
    let (d_out, d_in) = (5, 70);
    // Magnitudes from subnormal to huge, where subtracting what was added could not give the weight back.
    let weight: Vec<f32> = normal(d_out * d_in, 1.0, 1)
        .iter()
        .zip((0..7).cycle())
        .map(|(w, e)| w * [1e-40, 1e-9, 1e-3, 1.0, 1e5, 1e20, -0.0][e])
        .collect();
    let adapter = adapter(d_out, d_in, 3);
    let expected = merged(&weight, &adapter);
    let mut layer = LoRALayer::from_parts(Tensor::from_vec(weight.clone(), false), adapter).unwrap();
    let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
    let y = layer.forward(&x);
    for _ in 0..3 {
        layer.merge();
        layer.merge();
        assert!(layer.is_merged());
        assert_eq!(bits(layer.base_weight().data()), bits(&expected));
        layer.unmerge();
        layer.unmerge();
        assert!(!layer.is_merged());
        assert_eq!(bits(layer.base_weight().data()), bits(&weight));
        assert_eq!(bits(layer.forward(&x).data()), bits(y.data()));
    }
}

#[test]
fn a_merged_forward_uses_the_merged_weight_alone() {
    let mut layer = LoRALayer::from_parts(Tensor::from_vec(normal(4 * 64, 0.02, 1), false), adapter(4, 64, 3)).unwrap();
    let x = Tensor::from_vec(normal(64, 1.0, 4), false);
    let before = layer.forward(&x);
    layer.merge();
    let after = layer.forward(&x);
    let exact = |row: &[f32]| row.iter().zip(x.data()).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
    for (i, w) in layer.base_weight().data().chunks(64).enumerate() {
        // 64 terms in 8 lanes: 13 roundings of terms below 1 each; counted as 64 for all of them.
        assert!((f64::from(after.data()[i]) - exact(w)).abs() < 64.0 * 13.0 / 16_777_216.0);
        assert!((after.data()[i] - before.data()[i]).abs() < 1e-4);
    }
}

#[test]
fn from_lora_of_a_merged_layer_counts_the_adapter_once() {
    let (d_out, d_in) = (8, 128);
    for make in [QLoRALayer::from_lora, QLoRALayer::from_lora_double_quant] {
        let plain =
            LoRALayer::from_parts(Tensor::from_vec(normal(d_out * d_in, 0.02, 1), false), adapter(d_out, d_in, 4))
                .unwrap();
        let mut merged = plain.clone();
        merged.merge();
        let (plain, merged) = (make(plain), make(merged));
        assert!(!merged.is_merged());
        let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
        assert_eq!(bits(plain.forward(&x).data()), bits(merged.forward(&x).data()));
        assert_eq!(bits(&plain.merge_to_f32()), bits(&merged.merge_to_f32()));
    }
}

#[test]
fn from_lora_keeps_adapter_and_scaling() {
    let (d_out, d_in, rank) = (4, 64, 3);
    let weight = Tensor::from_vec(normal(d_out * d_in, 0.02, 1), false);
    let mut lora = LoRALayer::new_with_scaling(weight, d_out, d_in, rank, 8.0, LoRAScaling::RsLoRA);
    lora.lora_b_mut().data_mut()[5] = 0.25;
    let (a, b, scale) = (bits(lora.lora_a().data()), bits(lora.lora_b().data()), lora.scale());
    let layer = QLoRALayer::from_lora(lora);
    assert_eq!((bits(layer.lora_a().data()), bits(layer.lora_b().data()), layer.scale()), (a, b, scale));
    assert_eq!((layer.rank(), layer.d_out(), layer.d_in()), (rank, d_out, d_in));
    assert_eq!((layer.adapter().scaling(), layer.adapter().alpha()), (LoRAScaling::RsLoRA, 8.0));
}

#[test]
fn a_bias_is_added_once_merged_or_not_and_goes_along_to_packed_weights() {
    let (d_out, d_in) = (4, 64);
    let plain =
        LoRALayer::from_parts(Tensor::from_vec(normal(d_out * d_in, 0.02, 1), false), adapter(d_out, d_in, 3)).unwrap();
    let bias = normal(d_out, 1.0, 9);
    let mut layer = plain.clone().with_bias(bias.clone()).unwrap();
    assert_eq!((plain.bias(), layer.bias()), (None, Some(&bias[..])));
    let x = Tensor::from_vec(normal(d_in, 1.0, 4), false);
    let plus_bias = |y: Tensor| y.data().iter().zip(&bias).map(|(y, b)| y + b).collect::<Vec<_>>();
    assert_eq!(layer.forward(&x).data(), plus_bias(plain.forward(&x)));
    layer.merge();
    let mut merged = plain.clone();
    merged.merge();
    assert_eq!(layer.forward(&x).data(), plus_bias(merged.forward(&x)));
    let packed = QLoRALayer::from_lora(layer);
    assert_eq!(packed.bias(), Some(&bias[..]));
    assert_eq!(packed.forward(&x).data(), plus_bias(QLoRALayer::from_lora(plain.clone()).forward(&x)));
    let got = plain.clone().with_bias(vec![0.0; 3]).unwrap_err();
    assert_eq!(got.to_string(), "bias: expected length 4, got 3");
    let got = plain.with_bias(vec![0.0, 0.0, f32::INFINITY, 0.0]).unwrap_err();
    assert_eq!(got.to_string(), "bias: value 2 is inf, which is not finite");
}
