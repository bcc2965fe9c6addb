//! Threads that share a layer get the bits of one thread.
//!
//! There is nothing here for a model checker such as `loom` to explore: neither library has locks, cells, atomics or
//! statics that change, every forward takes `&self` and works in buffers that its caller lends or that it makes for
//! itself, and what changes a layer takes `&mut self`. `nf4` has no unsafe code, and what is unsafe in `nf4-kernels`
//! calls pure functions, so the compiler sees to the rest: the assertions below hold because of what the types are
//! made of. The one value that threads may write at the same time is the answer of the CPU to which instructions it
//! has (in `cpufeatures`: one atomic byte; whoever asks first, and whoever asks meanwhile, stores the same). Threads
//! of a pool get disjoint slices of the result; `tests/threads.rs` compares those bits.

#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

use std::sync::{Arc, Barrier};
use std::thread;

use nf4::{
    Absmax, AbsmaxBuf, Activations, AdapterId, Adapters, Arithmetic, BackwardScratch, BlockSize, Error, Inputs,
    InputsBuf, Isa, Kernels, LoRAAdapter, LoRALayer, LoRAScaling, MemoryStats, MultiAdapterLayer, NestedAbsmax,
    Nf4Matrix, QLoRALayer, Quantized4Bit, RequantizationStats, Scratch, ShapeError, SharedBytes, Store, Tensor, bf16,
};

/// Every public type can be sent to another thread and shared with it.
const _: () = {
    const fn shared<T: Send + Sync + 'static>() {}
    // nf4-kernels
    shared::<Absmax<'_>>();
    shared::<Activations<'_>>();
    shared::<BlockSize>();
    shared::<Isa>();
    shared::<Kernels>();
    shared::<NestedAbsmax<'_>>();
    shared::<Nf4Matrix<'_>>();
    shared::<ShapeError>();
    // nf4
    shared::<AbsmaxBuf>();
    shared::<AdapterId>();
    shared::<Adapters<'_>>();
    shared::<Arithmetic>();
    shared::<BackwardScratch>();
    shared::<Error>();
    shared::<Inputs<'_>>();
    shared::<InputsBuf>();
    shared::<LoRAAdapter>();
    shared::<LoRALayer>();
    shared::<LoRAScaling>();
    shared::<MemoryStats>();
    shared::<MultiAdapterLayer>();
    shared::<QLoRALayer>();
    shared::<Quantized4Bit>();
    shared::<RequantizationStats>();
    shared::<Scratch>();
    shared::<SharedBytes>();
    shared::<Store<f32>>();
    shared::<Tensor>();
    shared::<nf4::optim::AdamW>();
    shared::<nf4::optim::Moments>();
    shared::<nf4::optim::Sgd>();
};

#[cfg(feature = "safetensors")]
const _: () = {
    use nf4::checkpoint::*;
    const fn shared<T: Send + Sync + 'static>() {}
    shared::<CheckpointError>();
    shared::<FloatType>();
    shared::<GgufValue>();
    shared::<Header>();
    shared::<Layout>();
    shared::<Linear4bit>();
    shared::<MergedModel<'_>>();
    shared::<BiasTraining>();
    shared::<TargetModules>();
    shared::<PeftAdapter>();
    shared::<PeftConfig>();
    shared::<PeftModule>();
    shared::<QuantState>();
    shared::<QuantizationConfig>();
    shared::<TensorData<'_>>();
    shared::<TensorFile<'_>>();
    shared::<TensorMap<'_>>();
};

const D_OUT: usize = 150;
const D_IN: usize = 256;
const THREADS: usize = 8;
const BATCH: usize = 3;

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32) * 0.37 + seed as f32).sin()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn layer(arithmetic: Arithmetic) -> QLoRALayer {
    let base = Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, BlockSize::B64, true).unwrap();
    let (a, b) = (values(4 * D_IN, 2), values(D_OUT * 4, 3));
    let adapter = LoRAAdapter::from_parts(a, b, D_OUT, D_IN, 4, 8.0, LoRAScaling::Standard).unwrap();
    QLoRALayer::from_parts(base, adapter).unwrap().with_arithmetic(arithmetic)
}

/// What thread `n` does in its round `i`: the inputs differ, and so does the order of the operations.
fn work(layer: &QLoRALayer, scratch: &mut Scratch, n: usize, i: usize) -> Vec<u32> {
    let seed = u32::try_from(n * 100 + i).unwrap();
    let x = values(BATCH * D_IN, seed);
    let mut results = Vec::new();
    for operation in 0..4 {
        match (operation + n + i) % 4 {
            0 => {
                let mut y = vec![0.0; BATCH * D_OUT];
                layer.forward_into(&x, scratch, &mut y).unwrap();
                results.extend(bits(&y));
            }
            1 => results.extend(bits(layer.forward(&Tensor::from_vec(x[..D_IN].to_vec(), false)).data())),
            2 => {
                let mut rows = vec![bf16::ZERO; 2 * D_IN];
                layer.merge_rows_into(n..n + 2, &mut rows).unwrap();
                results.extend(rows.iter().map(|w| u32::from(w.to_bits())));
            }
            // A clone is trained, the layer is not.
            _ => {
                let mut own = layer.clone();
                let dy = Tensor::from_vec(values(BATCH * D_OUT, seed), false);
                results.extend(bits(own.backward(&Tensor::from_vec(x.clone(), false), &dy).data()));
                results.extend(bits(own.lora_a().grad().unwrap()));
                assert!(layer.lora_a().grad().is_none());
            }
        }
    }
    results
}

#[test]
fn threads_that_share_a_layer_get_the_bits_of_one() {
    for arithmetic in Arithmetic::ALL {
        let layer = Arc::new(layer(arithmetic));
        let start = Arc::new(Barrier::new(THREADS));
        let run = |layer: &QLoRALayer, n| {
            let mut scratch = layer.scratch(BATCH);
            (0..6).map(|i| work(layer, &mut scratch, n, i)).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let (layer, start) = (Arc::clone(&layer), Arc::clone(&start));
                thread::spawn(move || {
                    start.wait();
                    run(&layer, n)
                })
            })
            .collect();
        for (n, together) in threads.into_iter().enumerate() {
            assert!(together.join().unwrap() == run(&layer, n), "thread {n}, {arithmetic:?}");
        }
    }
}

/// Views of some rows, each in a thread of its own, with a slice of one output.
#[test]
fn threads_that_share_a_matrix_get_the_bits_of_one() {
    for kernels in Kernels::available() {
        let base = Quantized4Bit::quantize(&values(D_OUT * D_IN, 1), D_OUT, D_IN, BlockSize::B64, true).unwrap();
        let (view, x) = (base.view(), values(D_IN, 2));
        let mut q = vec![0; Activations::values_len(D_IN, BlockSize::B64)];
        let mut scales = vec![0.0; Activations::scales_len(D_IN, BlockSize::B64)];
        let activations = kernels.quantize_activations(&x, BlockSize::B64, &mut q, &mut scales).unwrap();
        let (mut whole, mut parts) = (vec![0.0; D_OUT], vec![0.0; D_OUT]);
        kernels.gemv(&view, &activations, &mut whole).unwrap();
        // Neither the number of threads nor that of their rows divides the rows.
        let rows = D_OUT / THREADS + 1;
        thread::scope(|scope| {
            for (n, out) in parts.chunks_mut(rows).enumerate() {
                let part = view.row_range(n * rows..n * rows + out.len()).unwrap();
                let activations = &activations;
                scope.spawn(move || kernels.gemv(&part, activations, out).unwrap());
            }
        });
        assert_eq!(bits(&parts), bits(&whole), "{}", kernels.isa());
    }
}

/// Threads that ask the CPU at the same time get one answer.
#[test]
fn threads_detect_the_same_kernels() {
    let start = Barrier::new(THREADS);
    let detected: Vec<Kernels> = thread::scope(|scope| {
        let detect = || {
            start.wait();
            Kernels::detect()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(detect)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(detected.iter().all(|k| *k == Kernels::detect()), "{detected:?}");
}
