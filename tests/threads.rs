//! With the feature `rayon`: the number of threads changes no bit.
#![cfg(feature = "rayon")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

use nf4::{Arithmetic, BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor, bf16};

/// Large enough to be shared, with a number of rows that no number of threads here divides, and more than two row chunks.
const D_OUT: usize = 2101;
const D_IN: usize = 2112;
const BATCH: usize = 3;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(0x3f80_0000 | state >> 9) - 1.5
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Everything that uses the pool.
fn results(block_size: BlockSize, arithmetic: Arithmetic) -> Vec<Vec<u32>> {
    let base = Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, block_size, true).unwrap();
    let packed = base.packed().iter().map(|b| u32::from(*b)).collect();
    let restored = bits(&base.dequantize::<f32>());
    let rank = 4;
    let mut adapter = LoRAAdapter::new(D_OUT, D_IN, rank, 8.0, LoRAScaling::Standard, 7).unwrap();
    adapter.b_mut().data_mut().copy_from_slice(&values(D_OUT * rank, 2));
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap().with_arithmetic(arithmetic);
    let x = Tensor::from_vec(values(BATCH * D_IN, 3), false);
    let y = layer.forward(&x);
    let dx = layer.backward(&x, &Tensor::from_vec(values(BATCH * D_OUT, 4), false));
    let gradients = [layer.lora_a(), layer.lora_b()].map(|t| bits(t.grad().unwrap()));
    let single = layer.forward(&Tensor::from_vec(x.data()[..D_IN].to_vec(), false));
    let mut merged = vec![bf16::ZERO; 700 * D_IN];
    layer.merge_rows_into(3..703, &mut merged).unwrap();
    let merged = merged.iter().map(|m| u32::from(m.to_bits())).collect();
    let [a, b] = gradients;
    vec![
        packed,
        restored,
        bits(y.data()),
        bits(single.data()),
        bits(dx.data()),
        a,
        b,
        merged,
        bits(&layer.merge_to_f32()),
    ]
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for block_size in [BlockSize::B32, BlockSize::B64, BlockSize::B128] {
        for arithmetic in [Arithmetic::SixteenByFour, Arithmetic::F32] {
            let in_pool = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    assert_eq!(rayon::current_num_threads(), threads);
                    results(block_size, arithmetic)
                })
            };
            let expected = in_pool(1);
            for threads in [2, 3, 5, 16] {
                assert!(in_pool(threads) == expected, "{threads} threads, {block_size:?}, {arithmetic:?}");
            }
        }
    }
}
