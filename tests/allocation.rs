//! The forwards and backwards that end in `_into` allocate nothing, and a layer no more than it says; a counting
//! allocator sees to it.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests panic, and have std")]

use std::sync::Arc;

use allocation_counter::measure;
use nf4::{
    Absmax, AbsmaxBuf, Adapters, Arithmetic, BlockSize, DYNAMIC_MAP, InputsBuf, Kernels, LoRAAdapter, LoRAScaling,
    MultiAdapterLayer, QLoRALayer, Quantized4Bit, Scratch, SharedBytes, Store, Threads, bf16, f16,
};

const RANK: usize = 5;

/// More rows than a forward finishes at a time; 96 columns straddle blocks of 64.
const SHAPES: [[usize; 2]; 3] = [[200, 256], [3, 96], [1, 1]];

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn base([d_out, d_in]: [usize; 2], double_quant: bool) -> Quantized4Bit {
    Quantized4Bit::quantize(&values(d_out * d_in), d_out, d_in, BlockSize::B64, double_quant).unwrap()
}

fn adapter([d_out, d_in]: [usize; 2], rank: usize) -> LoRAAdapter {
    let (a, b) = (values(rank * d_in), values(d_out * rank));
    LoRAAdapter::from_parts(a, b, d_out, d_in, rank, 2.0, LoRAScaling::Standard).unwrap()
}

/// Splits operations as for three threads and runs all parts on this one, whose allocations are the ones that are counted. A
/// pool may allocate for its own queue.
struct Parts;

impl Threads for Parts {
    fn count(&self) -> usize {
        3
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        a();
        b();
    }
}

/// Fails if `run` allocates.
fn check(name: &str, run: impl FnOnce()) {
    let info = measure(run);
    assert_eq!((info.count_total, info.bytes_total), (0, 0), "{name}: {info:?}");
}

#[test]
fn the_counter_counts() {
    let info = measure(|| drop(core::hint::black_box(Vec::<u8>::with_capacity(100))));
    assert_eq!((info.count_total, info.bytes_total), (1, 100));
}

#[test]
fn forwards_into_buffers_allocate_nothing() {
    for kernels in Kernels::available() {
        println!("instruction set: {}", kernels.isa());
        for shape @ [d_out, d_in] in SHAPES {
            for (double_quant, arithmetic) in
                [(false, Arithmetic::SixteenByFour), (true, Arithmetic::EightByEight), (true, Arithmetic::F32)]
            {
                let layer = QLoRALayer::from_parts(base(shape, double_quant), adapter(shape, RANK)).unwrap();
                let layer = layer.with_bias(values(d_out)).unwrap();
                let layer = layer.with_kernels(kernels).with_arithmetic(arithmetic).with_threads(Arc::new(Parts));
                let name = format!("{d_out}x{d_in}, {arithmetic:?}, {}", kernels.isa());
                let mut scratch = layer.scratch(140);
                // The largest batch, smaller ones, and the largest again.
                for batch in [140, 3, 1, 140] {
                    let (x, mut y) = (values(batch * d_in), vec![0.0; batch * d_out]);
                    check(&name, || layer.forward_into(&x, &mut scratch, &mut y).unwrap());
                    check(&name, || layer.forward_into(&x[..d_in], &mut scratch, &mut y[..d_out]).unwrap());
                    let x: Vec<_> = x.into_iter().map(bf16::from_f32).collect();
                    let mut y = vec![f16::ZERO; batch * d_out];
                    check(&name, || layer.forward_into(&x, &mut scratch, &mut y).unwrap());
                }
            }
        }
    }
}

#[test]
fn many_adapters_allocate_nothing() {
    for shape @ [d_out, d_in] in SHAPES {
        let mut layer = MultiAdapterLayer::new(base(shape, true));
        let [a, b, dora] =
            [("a", adapter(shape, 3)), ("b", adapter(shape, 40)), ("dora", adapter(shape, 2).with_dora())]
                .map(|(name, adapter)| Some(layer.add(name, adapter).unwrap()));
        let mut scratch = layer.scratch(5);
        for (batch, choice) in [(5, &[b, None, a, None, dora][..]), (1, &[a])] {
            let (x, mut y) = (values(batch * d_in), vec![0.0; batch * d_out]);
            let mut halves = vec![bf16::ZERO; batch * d_out];
            for active in [&[][..], &["a"], &["b", "a", "dora"]] {
                layer.set_active(active).unwrap();
                let active = Adapters::Active;
                check("active", || layer.forward_into(&x, active, &mut scratch, &mut y).unwrap());
                check("one", || layer.forward_into(&x[..d_in], active, &mut scratch, &mut y[..d_out]).unwrap());
                check("types", || layer.forward_into(&x, active, &mut scratch, &mut halves).unwrap());
            }
            let chosen = Adapters::PerVector(choice);
            check("chosen", || layer.forward_into(&x, chosen, &mut scratch, &mut y).unwrap());
            check("types", || layer.forward_into(&x, chosen, &mut scratch, &mut halves).unwrap());
        }
    }
}

#[test]
fn inputs_that_layers_share_allocate_nothing() {
    for shape @ [d_out, d_in] in SHAPES {
        let layer = QLoRALayer::from_parts(base(shape, true), adapter(shape, RANK)).unwrap();
        let (mut buffers, mut scratch) = (InputsBuf::new(), layer.scratch(7));
        buffers.reserve(d_in, BlockSize::B64, 7).unwrap();
        for batch in [7, 1] {
            let (x, mut y) = (values(batch * d_in), vec![0.0; batch * d_out]);
            check("shared inputs", || {
                let inputs = layer.quantize_inputs(&x, &mut buffers).unwrap();
                layer.forward_shared(&inputs, &mut scratch, &mut y).unwrap();
                layer.forward_shared(&inputs, &mut scratch, &mut y).unwrap();
            });
        }
    }
}

/// A weight in a file in memory, and a layer on it: only what the layer adds is allocated.
#[test]
fn shared_weights_are_not_copied() {
    let [d_out, d_in] = [200, 256];
    for double_quant in [false, true] {
        let owned = base([d_out, d_in], double_quant);
        let (codes, floats, offset) = match owned.absmax().view() {
            Absmax::Nested(nested) => (nested.codes(), nested.absmax(), nested.offset()),
            Absmax::Plain(absmax) => (&[][..], absmax, 0.0),
            _ => panic!("another kind of scales"),
        };
        let floats: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        // Both lengths before the floats are multiples of 4, and so their address is.
        let parts = [owned.packed(), codes, &floats].concat();
        let mut file = vec![0; parts.len() + 3];
        let start = file.as_ptr().align_offset(4);
        file[start..][..parts.len()].copy_from_slice(&parts);
        let file: SharedBytes = Arc::new(file);
        let (at_codes, at_floats) = (start + owned.packed().len(), start + owned.packed().len() + codes.len());
        let share = || {
            let bytes = |range| Store::<u8>::shared(file.clone(), range);
            let floats = Store::<f32>::shared(file.clone(), at_floats..at_floats + floats.len())?;
            let absmax = if double_quant {
                AbsmaxBuf::nested(bytes(at_codes..at_floats)?, floats, &DYNAMIC_MAP, offset)?
            } else {
                AbsmaxBuf::plain(floats)
            };
            Quantized4Bit::from_parts(bytes(start..at_codes)?, absmax, d_out, d_in, BlockSize::B64)
        };
        let mut weight = None;
        check("a shared weight", || weight = Some(share().unwrap()));
        let weight = weight.unwrap();
        assert_eq!(weight.dequantize::<f32>(), owned.dequantize::<f32>());
        check("a clone of it", || drop(core::hint::black_box(weight.clone())));
        let mut layer = MultiAdapterLayer::new(weight);
        let mut scratch = layer.scratch(3);
        let (x, mut y) = (values(3 * d_in), vec![0.0; 3 * d_out]);
        check("its forward", || layer.forward_into(&x, Adapters::Active, &mut scratch, &mut y).unwrap());
        layer = layer.with_arithmetic(Arithmetic::F32);
        check("its forward", || layer.forward_into(&x, Adapters::Active, &mut scratch, &mut y).unwrap());
    }
}

#[test]
fn scratch_takes_what_it_says() {
    for batch in [0, 1, 9] {
        let info = measure(|| {
            let mut scratch = Scratch::new();
            scratch.reserve(200, 256, BlockSize::B64, RANK, batch).unwrap();
            core::mem::forget(core::hint::black_box(scratch));
        });
        assert_eq!(info.bytes_total, Scratch::bytes(200, 256, BlockSize::B64, RANK, batch) as u64);
    }
}

#[test]
fn a_layer_holds_what_memory_stats_say() {
    for double_quant in [false, true] {
        let (base, adapter, bias) = (base([200, 256], double_quant), adapter([200, 256], RANK), values(200));
        let info = measure(|| {
            let layer = QLoRALayer::from_parts(base.clone(), adapter.clone()).unwrap();
            core::mem::forget(core::hint::black_box(layer.with_bias(bias.clone()).unwrap()));
        });
        let layer = QLoRALayer::from_parts(base.clone(), adapter.clone()).unwrap().with_bias(bias).unwrap();
        let stats = layer.memory_stats();
        assert_eq!(info.bytes_total, stats.total_bytes as u64);

        // DoRA: a magnitude, a norm and a gain for each row; a row of the base is held for a moment.
        let info = measure(|| {
            let dora = QLoRALayer::from_parts(base.clone(), adapter.clone().with_dora()).unwrap();
            assert_eq!(dora.memory_stats().lora_bytes, stats.lora_bytes + 200 * 12);
            core::mem::forget(core::hint::black_box(dora));
        });
        assert_eq!(info.bytes_current, (stats.base_quantized_bytes + stats.lora_bytes + 200 * 12) as i64);
    }
}

#[test]
fn backwards_into_buffers_allocate_nothing_once_there_are_gradients() {
    for kernels in Kernels::available() {
        for shape @ [d_out, d_in] in SHAPES {
            let plain = adapter(shape, RANK);
            for adapter in [plain.clone(), plain.with_dora()] {
                let dora = adapter.is_dora();
                let layer = QLoRALayer::from_parts(base(shape, true), adapter).unwrap();
                let mut layer = layer.with_kernels(kernels);
                let name = format!("{d_out}x{d_in}, DoRA {dora}, {}", kernels.isa());
                let mut scratch = layer.backward_scratch(20);
                // Gradients in groups of 32, each with a scale.
                let (floats, groups) = (3 * 20 * RANK + (d_out * RANK.max(21)).max(d_in), 20 * d_out.div_ceil(32));
                assert_eq!(scratch.memory_bytes(), floats * 4 + groups * (32 * 2 + 4));
                let (x, dy, mut dx) = (values(20 * d_in), values(20 * d_out), vec![0.0; 20 * d_in]);
                layer.backward_into(&x, &dy, &mut scratch, Some(&mut dx)).unwrap();
                for batch in [1, 20] {
                    let (x, dy, dx) = (&x[..batch * d_in], &dy[..batch * d_out], &mut dx[..batch * d_in]);
                    // With DoRA that makes norms stale, and the backward takes them again.
                    layer.lora_a_mut().data_mut()[0] += 1.0;
                    check(&name, || layer.backward_into(x, dy, &mut scratch, Some(dx)).unwrap());
                    check(&name, || layer.backward_into(x, dy, &mut scratch, None).unwrap());
                }
            }
        }
    }
}
