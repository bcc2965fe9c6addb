//! Where there is no memory for a buffer whose size the caller decides, functions that return a `Result` return an error.
//!
//! The allocator of this test refuses what goes beyond a limit. Every operation runs with less room than it needs, then
//! with a little more, and so on until it succeeds: an allocation that cannot fail would end the process.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

use std::alloc::System;
use std::sync::Arc;

use cap::Cap;
use nf4::optim::{AdamW, Sgd};
use nf4::{
    AbsmaxBuf, Adapters, BackwardScratch, BlockSize, Error, InputsBuf, LoRAAdapter, LoRALayer, LoRAScaling,
    MultiAdapterLayer, QLoRALayer, Quantized4Bit, Scratch, SharedBytes, Store, Tensor,
};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Large enough that each buffer takes more than [`STEP`].
const D_OUT: usize = 2048;
const D_IN: usize = 2112;
const RANK: usize = 8;
const BATCH: usize = 3;

/// What names, lists of tensors and the like may take.
const STEP: usize = 4096;

/// Runs an operation with more and more room. `run` gets what `prepare` made.
fn check<I, T>(name: &str, prepare: impl Fn() -> I, run: impl Fn(I) -> Result<T, Error>) {
    let (mut room, mut errors) = (STEP, 0);
    loop {
        let input = prepare();
        ALLOCATOR.set_limit(ALLOCATOR.allocated() + room).unwrap();
        let result = run(input);
        ALLOCATOR.set_limit(usize::MAX).unwrap();
        match result {
            Ok(_) => break,
            Err(Error::OutOfMemory { bytes }) => assert!(bytes > STEP, "{name}: {bytes} bytes"),
            Err(error) => panic!("{name}: {error}"),
        }
        errors += 1;
        room += room / 2;
    }
    println!("{name}: {errors} errors, then {room} bytes were enough");
    assert!(errors > 0, "{name} needs no memory");
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn tensor(len: usize) -> Tensor {
    Tensor::from_vec(values(len), false)
}

fn base(double_quant: bool) -> Quantized4Bit {
    Quantized4Bit::quantize(&values(D_OUT * D_IN), D_OUT, D_IN, BlockSize::B64, double_quant).unwrap()
}

fn adapter() -> LoRAAdapter {
    LoRAAdapter::new(D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard, 1).unwrap()
}

/// One test, because the limit is that of the process.
#[test]
fn buffers_that_there_is_no_memory_for_are_errors() {
    let weights = values(D_OUT * D_IN);
    let plain = base(false);
    for double_quant in [false, true] {
        let name = format!("quantize, double quantization {double_quant}");
        check(&name, || (), |()| Quantized4Bit::quantize(&weights, D_OUT, D_IN, BlockSize::B64, double_quant));
        let layer = QLoRALayer::from_parts(plain.clone(), adapter()).unwrap();
        check(&format!("re{name}"), || (), |()| layer.merge_requantized(BlockSize::B64, double_quant));
    }
    check("double_quantize", || (), |()| AbsmaxBuf::double_quantize(&weights));
    check("an adapter", || (), |()| LoRAAdapter::new(D_OUT, D_IN, RANK, 8.0, LoRAScaling::Standard, 1));
    let bytes = vec![0; 4 * STEP];
    check("f32 of bytes", || (), |()| Store::<f32>::from_le_bytes(&bytes));
    let shared: SharedBytes = Arc::new(bytes);
    // Of four ranges one is aligned, which takes nothing.
    let odd = 1 + (*shared).as_ref().as_ptr().align_offset(4);
    check("shared f32", || (), |()| Store::<f32>::shared(shared.clone(), odd..odd + 3 * STEP));

    // Layers.
    let weight = tensor(D_OUT * D_IN);
    let (x, dy) = (tensor(BATCH * D_IN), tensor(BATCH * D_OUT));
    check("a layer", || weight.clone(), |w| QLoRALayer::try_new(w, D_OUT, D_IN, RANK, 8.0));
    check("a dense layer", || weight.clone(), |w| LoRALayer::try_new(w, D_OUT, D_IN, RANK, 8.0));
    let dense = LoRALayer::new(weight.clone(), D_OUT, D_IN, RANK, 8.0);
    check("from_lora", || dense.clone(), QLoRALayer::try_from_lora);
    check("from_lora_double_quant", || dense.clone(), QLoRALayer::try_from_lora_double_quant);
    check("a dense forward", || (), |()| dense.try_forward(&x));
    check("a dense backward", || dense.clone(), |mut layer| layer.try_backward(&x, &dy));
    let dora = || (plain.clone(), adapter().with_dora());
    check("norms", dora, |(base, adapter)| QLoRALayer::from_parts(base, adapter));
    for adapter in [adapter(), adapter().with_dora()] {
        let layer = QLoRALayer::from_parts(plain.clone(), adapter).unwrap();
        check("a forward", || (), |()| layer.try_forward(&x));
        check("a backward", || layer.clone(), |mut layer| layer.try_backward(&x, &dy));
        let scratch = || (layer.clone(), layer.backward_scratch(BATCH));
        let backward = |(mut layer, mut scratch): (QLoRALayer, BackwardScratch)| {
            layer.backward_into(x.data(), dy.data(), &mut scratch, None)
        };
        check("gradients", scratch, backward);
        check("a merge", || vec![0.0_f32; D_IN], |mut row| layer.merge_rows_into(0..1, &mut row));
        let mut stale = layer.clone();
        let _ = stale.adapter_mut();
        if layer.adapter().is_dora() {
            check("a row of norms", || stale.clone(), |mut layer| layer.refresh_dora());
        }
    }
    let multi = || (MultiAdapterLayer::new(plain.clone()), adapter().with_dora());
    check("adding an adapter", multi, |(mut layer, adapter)| layer.add("a", adapter));
    check("a forward of many", multi, |(layer, _)| layer.try_forward(&x, Adapters::Active));

    // Scratch.
    check("scratch", Scratch::new, |mut s| s.reserve(D_OUT, D_IN, BlockSize::B64, RANK, BATCH));
    check("inputs", InputsBuf::new, |mut b| b.reserve(D_IN, BlockSize::B64, BATCH));
    check("backward scratch", BackwardScratch::new, |mut s| s.reserve(D_OUT, D_IN, RANK, BATCH));

    // Training.
    let trained = || Tensor::from_vec(values(STEP), true);
    let grad = values(STEP);
    check("a gradient", trained, |mut tensor| tensor.accumulate_grad(&grad));
    let with_gradient = || {
        let mut tensor = trained();
        tensor.accumulate_grad(&grad).unwrap();
        tensor
    };
    check("momentum", with_gradient, |mut tensor| {
        let mut sgd = Sgd { momentum: 0.9, ..Sgd::new(0.1) };
        let before = tensor.data()[1];
        let result = sgd.step([&mut tensor]);
        assert_eq!(result.is_err(), tensor.data()[1] == before && sgd.state.is_empty(), "nothing was changed");
        result
    });
    check("moments", with_gradient, |mut tensor| {
        let mut adam = AdamW::new(0.1);
        let before = tensor.data()[1];
        let result = adam.step([&mut tensor]);
        assert_eq!(result.is_err(), tensor.data()[1] == before && adam.state.is_empty(), "nothing was changed");
        result
    });
}
