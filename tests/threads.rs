//! The number of threads, and the pool that they come from, change no bit.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

#[path = "support/generator.rs"]
mod generator;

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use generator::Generator;
use nf4::{
    Adapters, Arithmetic, BlockSize, LoRAAdapter, LoRALayer, LoRAScaling, MultiAdapterLayer, QLoRALayer, Quantized4Bit,
    Tensor, Threads, bf16,
};

/// Large enough to be shared, with a number of rows that no number of threads here divides, and more than two row chunks.
const D_OUT: usize = 2101;
const D_IN: usize = 2112;
const BATCH: usize = 3;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut generator = Generator(seed);
    (0..n).map(|_| generator.value()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Everything that uses threads: those of a pool, or by default.
fn results(block_size: BlockSize, arithmetic: Arithmetic, pool: Option<Arc<dyn Threads>>) -> Vec<Vec<u32>> {
    let base = Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, block_size, true).unwrap();
    let packed = base.packed().iter().map(|b| u32::from(*b)).collect();
    let dequantized = bits(&base.dequantize::<f32>());
    let rank = 4;
    let mut adapter = LoRAAdapter::new(D_OUT, D_IN, rank, 8.0, LoRAScaling::Standard, 7).unwrap();
    adapter.b_mut().data_mut().copy_from_slice(&values(D_OUT * rank, 2));
    let mut layer = QLoRALayer::from_parts(base, adapter).unwrap().with_arithmetic(arithmetic);
    if let Some(pool) = &pool {
        layer = layer.with_threads(pool.clone());
    }
    let x = Tensor::from_vec(values(BATCH * D_IN, 3), false);
    let y = layer.forward(&x);
    let dx = layer.backward(&x, &Tensor::from_vec(values(BATCH * D_OUT, 4), false));
    let gradients = [layer.lora_a(), layer.lora_b()].map(|t| bits(t.grad().unwrap()));
    // A vector alone, whose chunks of rows are shared.
    let one = Tensor::from_vec(x.data()[..D_IN].to_vec(), false);
    let dx_of_one = layer.backward(&one, &Tensor::from_vec(values(D_OUT, 4), false));
    let single = layer.forward(&Tensor::from_vec(x.data()[..D_IN].to_vec(), false));
    let mut merged = vec![bf16::ZERO; 700 * D_IN];
    layer.merge_rows_into(3..703, &mut merged).unwrap();
    let merged = merged.iter().map(|m| u32::from(m.to_bits())).collect();
    let [a, b] = gradients;
    vec![
        packed,
        dequantized,
        bits(y.data()),
        bits(single.data()),
        bits(dx.data()),
        bits(dx_of_one.data()),
        a,
        b,
        merged,
        bits(&layer.merge_to_f32()),
    ]
}

/// Forwards of enough vectors that low-rank products and the steps after the base product are split too, by vectors.
fn batches(pool: Arc<dyn Threads>) -> Vec<Vec<u32>> {
    const D_OUT: usize = 301;
    const D_IN: usize = 512;
    const BATCH: usize = 301;
    let adapter = |rank, seed| {
        let (a, b) = (values(rank * D_IN, seed), values(D_OUT * rank, seed + 1));
        LoRAAdapter::from_parts(a, b, D_OUT, D_IN, rank, 2.0, LoRAScaling::Standard).unwrap()
    };
    let weight = values(D_OUT * D_IN, 5);
    let base = Quantized4Bit::quantize(&weight, D_OUT, D_IN, BlockSize::B64, false).unwrap();
    let mut multi = MultiAdapterLayer::new(base).with_threads(pool.clone()).with_bias(values(D_OUT, 6)).unwrap();
    let magnitude = values(D_OUT, 7);
    let ids = [
        Some(multi.add("large", adapter(40, 8)).unwrap()),
        None,
        Some(multi.add("scaled", adapter(3, 10).with_magnitude(magnitude).unwrap()).unwrap()),
    ];
    let ids: Vec<_> = (0..BATCH).map(|n| ids[n % 3]).collect();
    let x = Tensor::from_vec(values(BATCH * D_IN, 12), false);
    let dense = LoRALayer::from_parts(Tensor::from_vec(weight, false), adapter(40, 8)).unwrap().with_threads(pool);
    [multi.forward(&x, Adapters::PerVector(&ids)), dense.forward(&x)].map(|y| bits(y.data())).into()
}

/// A thread for each split, of the standard library.
struct Spawn {
    count: usize,
    splits: AtomicUsize,
}

impl Spawn {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { count, splits: AtomicUsize::new(0) })
    }
}

impl Threads for Spawn {
    fn count(&self) -> usize {
        self.count
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        self.splits.fetch_add(1, Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(b);
            a();
        });
    }
}

/// A pool that calls what it is given so often, in this order.
struct Careless(&'static [usize]);

impl Threads for Careless {
    fn count(&self) -> usize {
        3
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        for which in self.0 {
            if *which == 0 { a() } else { b() }
        }
    }
}

#[test]
fn any_pool_gives_a_batch_the_bits_of_one_thread() {
    let one = Spawn::new(1);
    let expected = batches(one.clone());
    assert_eq!(one.splits.load(Ordering::Relaxed), 0);
    let two = Spawn::new(2);
    assert!(batches(two.clone()) == expected, "two threads");
    // Of each layer the base product, `A x`, and what comes after it; and `B` times that for all vectors if they share it.
    assert_eq!(two.splits.load(Ordering::Relaxed), 2 * 3 + 1);
    for pool in [Spawn::new(3) as Arc<dyn Threads>, Spawn::new(7), Arc::new(Careless(&[1, 0])), Arc::new(Careless(&[]))]
    {
        let count = pool.count();
        assert!(batches(pool) == expected, "{count} threads");
    }
}

#[test]
fn any_pool_gives_the_bits_of_one_thread() {
    for (block_size, arithmetic) in [
        (BlockSize::B64, Arithmetic::SixteenByFour),
        (BlockSize::B64, Arithmetic::EightByEight),
        (BlockSize::B128, Arithmetic::F32),
    ] {
        let one = Spawn::new(1);
        let expected = results(block_size, arithmetic, Some(one.clone()));
        assert_eq!(one.splits.load(Ordering::Relaxed), 0);
        for count in [0, 2, 3, 7] {
            let pool = Spawn::new(count);
            assert!(results(block_size, arithmetic, Some(pool.clone())) == expected, "{count} threads, {block_size:?}");
            assert_eq!(pool.splits.load(Ordering::Relaxed) > 0, count > 1, "{count} threads were used");
        }
        for order in [&[][..], &[0], &[1], &[1, 0], &[0, 0, 1, 1, 0]] {
            let got = results(block_size, arithmetic, Some(Arc::new(Careless(order))));
            assert!(got == expected, "a pool that calls {order:?}, {block_size:?}");
        }
    }
}

/// The norms of `DoRA`, which are shared by rows.
#[test]
fn any_pool_gives_the_norms_of_one_thread() {
    let base = Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, BlockSize::B64, true).unwrap();
    let adapter = LoRAAdapter::new(D_OUT, D_IN, 2, 8.0, LoRAScaling::Standard, 7).unwrap().with_dora();
    let fresh = QLoRALayer::from_parts(base, adapter).unwrap();
    let x = Tensor::from_vec(values(D_IN, 3), false);
    let outputs = |pool: Arc<dyn Threads>| {
        let mut layer = fresh.clone().with_threads(pool);
        layer.lora_b_mut().data_mut().copy_from_slice(&values(D_OUT * 2, 2));
        layer.refresh_dora().unwrap();
        bits(layer.with_threads(Spawn::new(1)).forward(&x).data())
    };
    let one = Spawn::new(1);
    let expected = outputs(one.clone());
    assert_eq!(one.splits.load(Ordering::Relaxed), 0);
    assert!(bits(fresh.forward(&x).data()) != expected, "the norms have changed");
    for count in [2, 3, 7] {
        let pool = Spawn::new(count);
        assert!(outputs(pool.clone()) == expected, "{count} threads");
        assert_eq!(pool.splits.load(Ordering::Relaxed), count - 1);
    }
    for order in [&[][..], &[0], &[1, 0], &[0, 0, 1, 1, 0]] {
        assert!(outputs(Arc::new(Careless(order))) == expected, "a pool that calls {order:?}");
    }
}

/// A dense layer, and the panic of a thread.
#[test]
fn a_panic_in_a_pool_comes_through() {
    struct Panics;
    impl Threads for Panics {
        fn count(&self) -> usize {
            2
        }
        fn join(&self, _: &mut (dyn FnMut() + Send), _: &mut (dyn FnMut() + Send)) {
            panic!("no thread is left");
        }
    }
    let base = Tensor::from_vec(values(D_OUT * D_IN, 1), false);
    let layer = LoRALayer::new(base, D_OUT, D_IN, 2, 4.0).with_threads(Arc::new(Panics));
    let layer = QLoRALayer::from_lora(layer).with_threads(Arc::new(Panics));
    let forward = || layer.forward(&Tensor::zeros(BATCH * D_IN, false));
    let panic = std::panic::catch_unwind(core::panic::AssertUnwindSafe(forward)).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"no thread is left"));
}

#[cfg(feature = "rayon")]
#[test]
fn the_number_of_threads_changes_no_bit() {
    for block_size in [BlockSize::B32, BlockSize::B64, BlockSize::B128] {
        for arithmetic in [Arithmetic::SixteenByFour, Arithmetic::F32] {
            let in_pool = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    assert_eq!(rayon::current_num_threads(), threads);
                    results(block_size, arithmetic, None)
                })
            };
            let expected = in_pool(1);
            for threads in [2, 3, 5, 16] {
                assert!(in_pool(threads) == expected, "{threads} threads, {block_size:?}, {arithmetic:?}");
            }
        }
    }
}
