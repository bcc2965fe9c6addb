//! Many adapters on one base.

use nf4::{
    AdapterId, Adapters, Arithmetic, BackwardScratch, BlockSize, Error, Gradients, LoRAAdapter, LoRAScaling,
    MultiAdapterLayer, QLoRALayer, Quantized4Bit, Scratch, Tensor, bf16,
};

use crate::{all_kernels, bits, normal, truth};

/// Names that are not sorted, and ranks that differ.
const ADAPTERS: [(&str, usize); 4] = [("support", 3), ("code", 20), ("zz", 1), ("code-2", 8)];

fn base(d_out: usize, d_in: usize) -> Quantized4Bit {
    Quantized4Bit::quantize(&normal(d_out * d_in, 0.02, 1), d_out, d_in, BlockSize::B64, true).unwrap()
}

/// The adapter of a rank, which gives its values too.
fn adapter(d_out: usize, d_in: usize, rank: usize, alpha: f64) -> LoRAAdapter {
    let seed = u64::try_from(rank).unwrap();
    let (a, b) = (normal(rank * d_in, 0.05, seed + 10), normal(d_out * rank, 0.05, seed + 20));
    LoRAAdapter::from_parts(a, b, d_out, d_in, rank, alpha, LoRAScaling::Standard).unwrap()
}

fn multi(d_out: usize, d_in: usize) -> MultiAdapterLayer {
    let mut layer = MultiAdapterLayer::new(base(d_out, d_in)).with_bias(normal(d_out, 0.3, 5)).unwrap();
    for (name, rank) in ADAPTERS {
        layer.add(name, adapter(d_out, d_in, rank, 16.0)).unwrap();
    }
    layer
}

/// The layer that has one adapter only.
fn single(d_out: usize, d_in: usize, rank: usize) -> QLoRALayer {
    let layer = QLoRALayer::from_parts(base(d_out, d_in), adapter(d_out, d_in, rank, 16.0)).unwrap();
    layer.with_bias(normal(d_out, 0.3, 5)).unwrap()
}

/// The base product plus bias: a fresh adapter adds zeros, which changes no bit but that of a zero's sign.
fn base_only(d_out: usize, d_in: usize) -> QLoRALayer {
    let fresh = LoRAAdapter::new(d_out, d_in, 1, 1.0, LoRAScaling::Standard, 0).unwrap();
    let layer = QLoRALayer::from_parts(base(d_out, d_in), fresh).unwrap();
    layer.with_bias(normal(d_out, 0.3, 5)).unwrap()
}

#[test]
fn a_vector_has_the_bits_of_a_layer_with_its_adapter_alone() {
    let kernels = all_kernels();
    for (d_out, d_in) in [(5, 64), (3, 33), (150, 256), (1, 1)] {
        for arithmetic in Arithmetic::ALL {
            let mut layer = multi(d_out, d_in).with_arithmetic(arithmetic);
            let choice = [Some("code"), None, Some("support"), Some("code"), Some("zz"), None, Some("code-2")];
            let x = Tensor::from_vec(normal(choice.len() * d_in, 1.0, 6), false);
            let expected: Vec<f32> = choice
                .iter()
                .zip(x.data().chunks(d_in))
                .flat_map(|(name, x)| {
                    let rank = name.map(|name| layer.adapter(name).unwrap().rank());
                    let alone = rank.map_or(base_only(d_out, d_in), |rank| single(d_out, d_in, rank));
                    alone.with_arithmetic(arithmetic).forward(&Tensor::from_vec(x.to_vec(), false)).into_vec()
                })
                .collect();
            let ids = choice.map(|name| layer.id(name?));
            for k in &kernels {
                layer = layer.with_kernels(*k);
                let name = format!("{d_out}x{d_in}, {arithmetic:?}, {}", k.isa());
                // What is active does not matter.
                for active in [&[][..], &["zz", "code"]] {
                    layer.set_active(active).unwrap();
                    assert_eq!(bits(layer.forward(&x, Adapters::PerVector(&ids)).data()), bits(&expected), "{name}");
                }
                // The same by switching.
                for ((name, x), y) in choice.iter().zip(x.data().chunks(d_in)).zip(expected.chunks(d_out)) {
                    layer.set_active(name.as_slice()).unwrap();
                    let x = Tensor::from_vec(x.to_vec(), false);
                    assert_eq!(bits(layer.forward(&x, Adapters::Active).data()), bits(y), "{name:?}");
                }
            }
        }
    }
}

/// Products with adapters that all vectors share are made for the batch; those of a vector must have the same bits.
#[test]
fn a_batch_with_the_same_adapters_has_the_bits_of_its_vectors() {
    for (d_out, d_in, batch) in [(5, 64, 8), (150, 256, 9), (3, 33, 70), (130, 64, 140)] {
        let mut layer = multi(d_out, d_in);
        layer.add("wide", adapter(d_out, d_in, 128, 16.0)).unwrap();
        layer.add("wider", adapter(d_out, d_in, 129, 16.0)).unwrap();
        let x = normal(batch * d_in, 1.0, 6);
        for k in all_kernels() {
            layer = layer.with_kernels(k);
            for active in [&["code", "zz", "wide"][..], &["support"], &["code", "wider"], &[]] {
                layer.set_active(active).unwrap();
                layer.set_adapter_weight("code", -0.7).unwrap();
                let one_by_one: Vec<f32> = x
                    .chunks(d_in)
                    .flat_map(|x| layer.forward(&Tensor::from_vec(x.to_vec(), false), Adapters::Active).into_vec())
                    .collect();
                let y = layer.forward(&Tensor::from_vec(x.clone(), false), Adapters::Active);
                assert_eq!(bits(y.data()), bits(&one_by_one), "{d_out}x{d_in}, batch {batch}, {active:?}, {}", k.isa());
                // Only the last one has another adapter.
                let mut ids = vec![layer.id("support"); batch];
                ids[batch - 1] = layer.id("zz");
                let y = layer.forward(&Tensor::from_vec(x.clone(), false), Adapters::PerVector(&ids));
                let last = Tensor::from_vec(x[(batch - 1) * d_in..].to_vec(), false);
                let alone = layer.forward(&last, Adapters::PerVector(&[layer.id("zz")]));
                assert_eq!(bits(&y.data()[(batch - 1) * d_out..]), bits(alone.data()), "{d_out}x{d_in}, {}", k.isa());
            }
        }
    }
}

/// The gradient of the input through the weight alone is the transposed product of the arithmetic.
#[test]
fn the_base_has_the_input_gradients_of_the_kernels() {
    for (d_out, d_in, batch) in [(5, 64, 3), (150, 256, 70), (3, 33, 2), (40, 64, 0), (40, 64, 1)] {
        for (arithmetic, k) in Arithmetic::ALL.into_iter().flat_map(|a| all_kernels().into_iter().map(move |k| (a, k)))
        {
            let layer = multi(d_out, d_in).with_arithmetic(arithmetic).with_kernels(k);
            let (dy, mut expected) = (normal(batch * d_out, 1.0, 6), vec![0.0; batch * d_in]);
            let view = layer.base_weight_quantized().view();
            if arithmetic == Arithmetic::F32 {
                k.gemm_transposed_f32(&view, &dy, &mut expected).unwrap();
            } else {
                let mut values = vec![0; batch * Gradients::values_len(d_out)];
                let mut scales = vec![0.0; batch * Gradients::scales_len(d_out)];
                let gradients = k.quantize_gradients(&dy, d_out, &mut values, &mut scales).unwrap();
                k.gemm_transposed(&view, &gradients, &mut expected).unwrap();
            }
            let (mut scratch, mut dx) = (BackwardScratch::new(), vec![f32::NAN; batch * d_in]);
            scratch.reserve(d_out, d_in, 0, batch).unwrap();
            layer.base_backward_into(&dy, &mut scratch, &mut dx).unwrap();
            assert_eq!(bits(&dx), bits(&expected), "{d_out}x{d_in}, batch {batch}, {arithmetic:?}, {}", k.isa());
        }
    }
    let (layer, mut scratch) = (multi(5, 64), BackwardScratch::new());
    let error = |dy: usize, dx: usize, scratch: &mut BackwardScratch| {
        layer.base_backward_into(&vec![1.0; dy], scratch, &mut vec![0.0; dx]).unwrap_err().to_string()
    };
    assert!(error(10, 128, &mut scratch).contains("scratch for the backward"));
    scratch.reserve(5, 64, 0, 2).unwrap();
    assert!(error(9, 128, &mut scratch).contains('9'));
    assert!(error(10, 127, &mut scratch).contains("127"));
}

#[test]
fn active_adapters_are_summed_with_their_weights() {
    for (d_out, d_in) in [(40, 256), (3, 33)] {
        let mut layer = multi(d_out, d_in);
        layer.set_active(&["zz", "code", "support"]).unwrap();
        layer.set_adapter_weight("code", -0.5).unwrap();
        layer.set_adapter_weight("zz", 0.0).unwrap();
        assert_eq!(
            (layer.adapter_weight("code"), layer.adapter_weight("support"), layer.adapter_weight("no")),
            (Some(-0.5), Some(1.0), None)
        );
        let x = Tensor::from_vec(normal(d_in, 1.0, 6), false);
        // A weight that is a power of two, like an alpha of so much more, rounds nothing.
        let mut expected = truth::forward(&base_only(d_out, d_in), x.data());
        truth::add_adapter(&adapter(d_out, d_in, 20, -8.0), x.data(), &mut expected);
        truth::add_adapter(&adapter(d_out, d_in, 3, 16.0), x.data(), &mut expected);
        // Here the bias comes last: four sums that may differ from those above by a bias, which is below 6 * 0.3 < 2.
        for e in &mut expected {
            e.bound += 4.0 * truth::EPS * (e.exact.abs() + e.bound + 2.0);
        }
        let y = layer.forward(&x, Adapters::Active);
        truth::check(&format!("{d_out}x{d_in}"), &expected, y.data());

        // Neither the order of adding nor that of activating changes a bit.
        let mut other = MultiAdapterLayer::new(base(d_out, d_in)).with_bias(normal(d_out, 0.3, 5)).unwrap();
        for (name, rank) in ADAPTERS.iter().rev() {
            other.add(name, adapter(d_out, d_in, *rank, 16.0)).unwrap();
        }
        other.set_adapter_weight("code", -0.5).unwrap();
        other.set_adapter_weight("zz", 0.0).unwrap();
        other.set_active(&["support", "zz", "code", "zz"]).unwrap();
        for k in all_kernels() {
            other = other.with_kernels(k);
            assert_eq!(bits(other.forward(&x, Adapters::Active).data()), bits(y.data()), "{}", k.isa());
        }
    }
}

#[test]
fn adapters_come_and_go() {
    let mut layer = multi(4, 64);
    let names = |layer: &MultiAdapterLayer| layer.names().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names(&layer), ["code", "code-2", "support", "zz"]);
    assert_eq!(layer.active().count(), 0);
    layer.set_active(&["zz", "code"]).unwrap();
    assert_eq!(layer.active().collect::<Vec<_>>(), ["code", "zz"]);
    layer.set_adapter_weight("zz", 0.25).unwrap();
    layer.rename("zz", "aa").unwrap();
    assert_eq!(names(&layer), ["aa", "code", "code-2", "support"]);
    layer.rename("code", "code").unwrap();
    assert_eq!(layer.active().collect::<Vec<_>>(), ["aa", "code"]);
    assert_eq!((layer.adapter_weight("aa"), layer.adapter("aa").map(LoRAAdapter::rank)), (Some(0.25), Some(1)));
    assert_eq!(layer.remove("code").unwrap().rank(), 20);
    assert_eq!(layer.active().collect::<Vec<_>>(), ["aa"]);
    assert!(layer.adapter("code").is_none());

    // Bytes: the base once, the bias, and what is left.
    let (stats, base) = (layer.memory_stats(), layer.base_weight_quantized().memory_bytes());
    assert_eq!((stats.base_quantized_bytes, stats.lora_bytes), (base, (1 + 3 + 8) * (4 + 64) * 4));
    assert_eq!(stats.total_bytes, base + stats.lora_bytes + 4 * 4);
    assert_eq!(layer.scratch(7).memory_bytes(), Scratch::bytes(4, 64, BlockSize::B64, 1 + 3 + 8, 7));
    assert_eq!(layer.bias().map(<[f32]>::len), Some(4));
}

#[test]
fn errors_name_the_adapter() {
    fn message<T>(result: Result<T, Error>) -> String {
        result.err().unwrap().to_string()
    }
    let mut layer = multi(4, 64);
    layer.set_active(&["zz"]).unwrap();
    let unknown = "there is no adapter named `French`";
    assert_eq!(message(layer.remove("French")), unknown);
    assert_eq!(message(layer.rename("French", "x")), unknown);
    assert_eq!(message(layer.set_adapter_weight("French", 1.0)), unknown);
    assert_eq!(message(layer.set_active(&["code", "French"])), unknown);
    assert_eq!(layer.active().collect::<Vec<_>>(), ["zz"]);
    assert_eq!(layer.id("French"), None);
    let (x, zz) = (Tensor::zeros(128, false), layer.id("zz"));
    let got = layer.try_forward(&x, Adapters::PerVector(&[zz]));
    assert_eq!(message(got), "adapters of the batch: expected length 2, got 1");

    let taken = "there is already an adapter named `code`";
    assert_eq!(message(layer.add("code", adapter(4, 64, 2, 1.0))), taken);
    assert_eq!(message(layer.rename("zz", "code")), taken);
    let got = layer.add("big", adapter(5, 64, 2, 1.0));
    let expected = "adapter `big`: the base is [d_out, d_in] = [4, 64], but the adapter was made for [5, 64]";
    assert_eq!(message(got), expected);
    let mut replaced = adapter(4, 64, 2, 1.0);
    *replaced.a_mut() = Tensor::zeros(7, true);
    assert_eq!(message(layer.add("odd", replaced)), "adapter `odd`: lora_a: expected 2 x 64 values, got 7");
    let got = layer.set_adapter_weight("zz", f32::NAN);
    assert_eq!(message(got), "adapter `zz`: weight: value 0 is NaN, which is not finite");
    let got = layer.set_adapter_weight("zz", f32::MAX);
    assert_eq!(message(got), "adapter `zz`: weight times scale: value 0 is inf, which is not finite");
    assert_eq!(layer.adapter_weight("zz"), Some(1.0));
    assert_eq!(layer.names().count(), 4);

    let (x, mut y) = ([0.0; 64], [0.0; 4]);
    let mut small = Scratch::new();
    small.reserve(4, 64, BlockSize::B64, 0, 1).unwrap();
    let got = layer.forward_into(&x, Adapters::Active, &mut small, &mut y);
    assert_eq!(message(got), "scratch for the low-rank product: expected length 1, got 0");
    let got = layer.try_forward(&Tensor::zeros(65, false), Adapters::Active);
    assert_eq!(message(got), "a batch of vectors of 64 values cannot have 65");
}

/// The outputs of one vector with one adapter, or none.
fn with(layer: &MultiAdapterLayer, id: Option<AdapterId>, x: &Tensor) -> Result<Vec<u32>, Error> {
    Ok(bits(layer.try_forward(x, Adapters::PerVector(&[id]))?.data()))
}

#[test]
fn an_id_stands_for_its_adapter_until_that_is_removed() {
    let (d_out, d_in) = (5, 64);
    let (mut layer, mut twin) = (multi(d_out, d_in), multi(d_out, d_in));
    let x = Tensor::from_vec(normal(d_in, 1.0, 6), false);
    let ids = ADAPTERS.map(|(name, _)| layer.id(name));
    assert_eq!(ids, ADAPTERS.map(|(name, _)| twin.id(name)), "added in the same order");
    let before = ids.map(|id| with(&layer, id, &x).unwrap());
    let clone = layer.clone();
    // Others come and go, in its slot too, and names change.
    layer.remove("code").unwrap();
    layer.rename("zz", "aa").unwrap();
    let new = layer.add("code", adapter(d_out, d_in, 2, 1.0)).unwrap();
    assert_eq!((layer.id("code"), layer.id("zz"), layer.id("aa")), (Some(new), None, ids[2]));
    assert_ne!(ids[1], Some(new));
    for (i, id) in ids.iter().enumerate() {
        let got = with(&layer, *id, &x);
        if ADAPTERS[i].0 == "code" {
            assert_eq!(got, Err(Error::RemovedAdapter));
        } else {
            assert_eq!(got.as_ref(), Ok(&before[i]));
        }
        assert_eq!(with(&clone, *id, &x).as_ref(), Ok(&before[i]));
    }
    assert_eq!(Error::RemovedAdapter.to_string(), "the adapter with this id was removed");
    // An id that this layer never gave.
    let far = (0..9).map(|i| twin.add(&i.to_string(), adapter(d_out, d_in, 1, 1.0)).unwrap()).last();
    assert_eq!(with(&layer, far, &x), Err(Error::RemovedAdapter));
}

#[test]
fn threads_share_one_layer() {
    let (d_out, d_in) = (20, 128);
    let layer = multi(d_out, d_in);
    let x = Tensor::from_vec(normal(3 * d_in, 1.0, 6), false);
    std::thread::scope(|scope| {
        for (name, rank) in ADAPTERS {
            let (layer, x) = (&layer, &x);
            scope.spawn(move || {
                let y = layer.forward(x, Adapters::PerVector(&[layer.id(name); 3]));
                assert_eq!(bits(y.data()), bits(single(d_out, d_in, rank).forward(x).data()), "{name}");
            });
        }
    });
}

#[test]
fn other_types() {
    let (d_out, d_in) = (20, 128);
    let mut layer = multi(d_out, d_in);
    layer.set_active(&["code"]).unwrap();
    let x: Vec<bf16> = normal(2 * d_in, 1.0, 6).into_iter().map(bf16::from_f32).collect();
    let exact = Tensor::from_vec(x.iter().map(|x| x.to_f32()).collect(), false);
    let expected: Vec<bf16> =
        layer.forward(&exact, Adapters::Active).data().iter().map(|y| bf16::from_f32(*y)).collect();
    let mut scratch = layer.scratch(2);
    let mut y = vec![bf16::ZERO; 2 * d_out];
    layer.forward_into(&x, Adapters::Active, &mut scratch, &mut y).unwrap();
    assert_eq!(y, expected);
    y.fill(bf16::ZERO);
    layer.forward_into(&x, Adapters::PerVector(&[layer.id("code"); 2]), &mut scratch, &mut y).unwrap();
    assert_eq!(y, expected);
}
