//! What a layer takes.

use nf4::{AbsmaxBuf, BlockSize, DYNAMIC_MAP, LoRALayer, MemoryStats, QLoRALayer, Quantized4Bit, Tensor};

use crate::{bits, normal};

fn stats(double_quant: bool) -> MemoryStats {
    let lora = LoRALayer::new(Tensor::from_vec(normal(256 * 512, 0.02, 1), false), 256, 512, 16, 32.0);
    let layer = if double_quant { QLoRALayer::from_lora_double_quant(lora) } else { QLoRALayer::from_lora(lora) };
    assert_eq!(layer.is_double_quantized(), double_quant);
    layer.memory_stats()
}

#[test]
fn memory_stats_are_exact() {
    // 131072 weights, 2048 blocks, 8 nested blocks; 768 x 16 adapter values.
    let (unquantized, codes, lora) = (131_072 * 4, 65_536, 49_152);
    let plain = stats(false);
    assert_eq!(
        plain,
        MemoryStats {
            base_unquantized_bytes: unquantized,
            base_quantized_bytes: codes + 2048 * 4,
            lora_bytes: lora,
            total_bytes: codes + 2048 * 4 + lora,
            compression_ratio: 32.0 / 4.5,
        }
    );
    let nested = stats(true);
    assert_eq!(
        nested,
        MemoryStats {
            base_unquantized_bytes: unquantized,
            base_quantized_bytes: codes + 2048 + 8 * 4,
            lora_bytes: lora,
            total_bytes: codes + 2048 + 8 * 4 + lora,
            compression_ratio: 32.0 / (4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0)),
        }
    );
}

#[test]
fn weights_are_counted() {
    for (rows, cols) in [(3, 5), (3, 0), (0, 5)] {
        let base = Quantized4Bit::quantize(&vec![0.5; rows * cols], rows, cols, BlockSize::B64, false).unwrap();
        let len = rows * cols;
        assert_eq!((base.rows(), base.cols(), base.len(), base.is_empty()), (rows, cols, len, len == 0));
    }
}

#[test]
fn a_bias_counts_in_the_total() {
    let layer = QLoRALayer::new(Tensor::from_vec(normal(4 * 64, 0.02, 1), false), 4, 64, 2, 2.0);
    let before = layer.memory_stats();
    let mut bias = Vec::with_capacity(100);
    bias.extend([1.0, 2.0, 3.0, 4.0]);
    let layer = layer.with_bias(bias.clone()).unwrap();
    assert_eq!(layer.memory_stats(), MemoryStats { total_bytes: before.total_bytes + 16, ..before });
    let (_, got, _) = layer.into_parts();
    assert_eq!(got, Some(bias));
}

#[test]
fn gradients_count_once_they_exist() {
    let weight = Tensor::from_vec(normal(4 * 64, 0.02, 1), false);
    let mut layer = QLoRALayer::new(weight, 4, 64, 2, 2.0);
    let before = layer.memory_stats().lora_bytes;
    assert_eq!(before, (4 + 64) * 2 * 4);
    for p in layer.trainable_params() {
        let len = p.len();
        p.accumulate_grad(&vec![1.0; len]).unwrap();
    }
    assert_eq!(layer.memory_stats().lora_bytes, 2 * before);
}

#[test]
fn bits_per_weight_of_every_block_size() {
    let weights = normal(4096 * 256, 0.02, 1);
    for block in BlockSize::ALL {
        let b = f64::from(u16::try_from(block.get()).unwrap());
        for (double_quant, expected) in [(false, 4.0 + 32.0 / b), (true, 4.0 + 8.0 / b + 32.0 / (b * 256.0))] {
            let base = Quantized4Bit::quantize(&weights, 256, 4096, block, double_quant).unwrap();
            assert_eq!(base.bits_per_weight(), expected);
        }
    }
}

#[test]
fn a_map_of_its_own_is_kept_only_if_it_differs() {
    let weights = normal(64 * 64, 0.02, 1);
    let base = Quantized4Bit::quantize(&weights, 64, 64, BlockSize::B64, true).unwrap();
    let nf4::Absmax::Nested(nested) = base.absmax().view() else { panic!("not nested") };
    let with_map = |map: &[f32; 256]| {
        let absmax =
            AbsmaxBuf::nested(nested.codes().to_vec(), nested.absmax().to_vec(), map, nested.offset()).unwrap();
        Quantized4Bit::from_parts(base.packed().to_vec(), absmax, 64, 64, BlockSize::B64).unwrap()
    };
    let same = with_map(&DYNAMIC_MAP);
    assert_eq!(same.memory_bytes(), base.memory_bytes());
    assert_eq!(bits(&same.dequantize()), bits(&base.dequantize()));
    let mut map = DYNAMIC_MAP;
    map[255] = map[255].next_down();
    assert_eq!(with_map(&map).memory_bytes(), base.memory_bytes() + 1024);
    let other = with_map(&DYNAMIC_MAP.map(|m| m * 0.5));
    assert!(bits(&other.dequantize()) != bits(&base.dequantize()));
}

#[test]
fn layers_can_be_shared_and_sent() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Tensor>();
    check::<LoRALayer>();
    check::<QLoRALayer>();
    check::<nf4::MultiAdapterLayer>();
    check::<Quantized4Bit>();
    check::<nf4::LoRAAdapter>();
    check::<nf4::Scratch>();
    check::<nf4::Kernels>();
    check::<nf4::Error>();
}
