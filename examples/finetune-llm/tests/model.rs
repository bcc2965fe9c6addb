//! The decoder against `nf4-llama`, on the tiny models of its tests.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use std::path::PathBuf;

use candle_core::Tensor;
use candle_nn::VarMap;
use nf4::checkpoint::{FloatType, TensorFile, TensorSource};
use nf4::{Arithmetic, LoRAScaling};
use nf4_candle::{load_peft, peft_adapter, save_peft};
use nf4_finetune_llm::{Adapters, Document, Llama, Sequence};
use nf4_llama::{Cache, CacheType, Directory, Logits, Model, Options, Part, Workspace, read_adapter};

const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn data(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../llama/tests/data")).join(name)
}

/// The tokens of a family's reference.
fn ids(family: &str) -> Vec<u32> {
    let bytes = std::fs::read(data(family).join("reference.safetensors")).unwrap();
    let file = TensorFile::parse(&bytes).unwrap();
    file.read("ids").unwrap().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn sequence(documents: &[&[u32]]) -> Sequence {
    let documents: Vec<Document> =
        documents.iter().map(|tokens| Document::new(tokens.to_vec(), vec![true; tokens.len()], 1)).collect();
    Sequence::new(&documents, &(0..documents.len()).collect::<Vec<_>>())
}

fn load(family: &str, arithmetic: Arithmetic, adapter: Option<&str>) -> Llama {
    let directory = Directory::open(&data(family)).unwrap();
    let start = adapter.map(|name| load_peft(data(family).join(name)).unwrap());
    let targets = TARGETS.map(str::to_string);
    let adapters = Adapters {
        targets: &targets,
        rank: 4,
        alpha: 8.0,
        scaling: LoRAScaling::Standard,
        dora: false,
        seed: 0,
        start: start.as_ref(),
    };
    Llama::load(directory.config().unwrap(), &directory, arithmetic, &adapters, &VarMap::new()).unwrap()
}

/// The logits of `nf4-llama`.
fn expected(family: &str, arithmetic: Arithmetic, adapter: Option<&str>, ids: &[u32]) -> Vec<f32> {
    let directory = Directory::open(&data(family)).unwrap();
    let options = Options { arithmetic, ..Options::default() };
    let mut model = Model::load(directory.config().unwrap(), &directory, options, |_, _| {}).unwrap();
    let adapter =
        adapter.map(|name| model.add_adapter(name, &read_adapter(&data(family).join(name)).unwrap()).unwrap());
    let mut workspace = Workspace::new(&model, ids.len(), ids.len()).unwrap();
    let mut cache = Cache::new(model.config(), ids.len(), CacheType::F32).unwrap();
    let parts = &mut [Part { cache: &mut cache, tokens: ids, adapter }];
    model.forward(parts, Logits::All, &mut workspace).unwrap().to_vec()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the root mean square of what is expected.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let rms = (expected.iter().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
    got.iter().zip(expected).fold(0.0, |most: f32, (a, b)| most.max((a - b).abs())) / rms
}

/// The linear layers are the same bits for the same inputs; norms, softmax and attention add in another order, which is 1e-6
/// of a logit. In f32 that is all; in 16x4 it can also tip an activation to the next of its 14 bits, 1e-4 of the largest in
/// a group, in any of 14 layers that add up. The bounds are those of `nf4-llama` against transformers.
#[test]
fn logits_are_those_of_nf4_llama() {
    for (arithmetic, bound) in [(Arithmetic::F32, 1e-5), (Arithmetic::SixteenByFour, 5e-3)] {
        for family in ["llama", "mistral", "qwen2", "qwen3"] {
            let ids = ids(family);
            let got = flat(&load(family, arithmetic, None).logits(&sequence(&[&ids])).unwrap());
            let most = difference(&got, &expected(family, arithmetic, None, &ids));
            println!("{family} {arithmetic:?}: {most:.1e}");
            assert!(most < bound, "{family}, {arithmetic:?}: {most}");
        }
        let ids = ids("llama");
        let got = flat(&load("llama", arithmetic, Some("adapter_one")).logits(&sequence(&[&ids])).unwrap());
        let most = difference(&got, &expected("llama", arithmetic, Some("adapter_one"), &ids));
        println!("llama with an adapter {arithmetic:?}: {most:.1e}");
        assert!(most < 4.0 * bound, "{most}");
    }
}

/// A model with an adapter of rank 2 whose values are not those it starts with: B is zero at first, and then A has no gradient.
fn changed(family: &str, dora: bool, vars: &VarMap) -> Llama {
    let directory = Directory::open(&data(family)).unwrap();
    let targets = TARGETS.map(str::to_string);
    let adapters =
        Adapters { targets: &targets, rank: 2, alpha: 4.0, scaling: LoRAScaling::Standard, dora, seed: 3, start: None };
    let model = Llama::load(directory.config().unwrap(), &directory, Arithmetic::F32, &adapters, vars).unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        let wave = |i: usize| (i as f32 * 0.9).sin();
        let values: Vec<f32> = if name.ends_with("lora_magnitude_vector") {
            flat(var).iter().enumerate().map(|(i, norm)| norm * (1.0 + 0.2 * wave(i))).collect()
        } else {
            (0..var.elem_count()).map(|i| wave(i) * 0.05).collect()
        };
        var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
    }
    model
}

/// An adapter with `DoRA`, from this program through the files of PEFT to the other one.
#[test]
fn logits_with_dora_are_those_of_nf4_llama() {
    let model = changed("llama", true, &VarMap::new());
    let folder = tempfile::tempdir().unwrap();
    save_peft(&peft_adapter(model.trained()).unwrap(), folder.path(), FloatType::F32).unwrap();
    let path = folder.path().to_str().unwrap();
    let ids = ids("llama");
    let got = flat(&model.logits(&sequence(&[&ids])).unwrap());
    let expected = expected("llama", Arithmetic::F32, Some(path), &ids);
    let most = difference(&got, &expected);
    println!("llama with DoRA: {most:.1e}");
    assert!(most < 4e-5, "{most}");
    // Read back here too, bit for bit.
    let read = load("llama", Arithmetic::F32, Some(path));
    assert_eq!(flat(&read.logits(&sequence(&[&ids])).unwrap()), got);
    let without = flat(&load("llama", Arithmetic::F32, None).logits(&sequence(&[&ids])).unwrap());
    assert!(difference(&without, &expected) > 1e-2, "the adapter changes something");
}

/// Documents of a sequence have the logits that they have alone: bit for bit, because each vector goes its own way through
/// every product, but for candle's own in the attention and the head.
#[test]
fn documents_of_a_sequence_do_not_meet() {
    let model = load("llama", Arithmetic::F32, Some("adapter_one"));
    let ids = ids("llama");
    let parts = [&ids[..10], &ids[20..21], &ids[5..40]];
    let alone: Vec<f32> = parts.iter().flat_map(|ids| flat(&model.logits(&sequence(&[ids])).unwrap())).collect();
    let together = flat(&model.logits(&sequence(&parts)).unwrap());
    assert!(difference(&together, &alone) < 1e-5);
}

#[test]
fn losses_are_those_of_the_logits() {
    let model = load("llama", Arithmetic::F32, None);
    let ids = ids("llama");
    let sequence = sequence(&[&ids[..30], &ids[30..]]);
    let logits = model.logits(&sequence).unwrap().to_vec2::<f32>().unwrap();
    let mut exact = 0.0;
    let (places, targets) = sequence.targets();
    assert_eq!(targets.len(), ids.len() - 2);
    for (place, target) in places.iter().zip(&targets) {
        let row = &logits[*place as usize];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        exact += sum.ln() - f64::from(row[*target as usize]);
    }
    for trains in [true, false] {
        let (loss, count) = model.loss(&sequence, trains).unwrap();
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        assert_eq!(count, targets.len());
        assert!((loss - exact).abs() < 1e-5 * exact, "{loss} {exact}");
    }
}

/// The whole way back: every 50th value of the first layer's `A` and the last one's `B`, against central differences in f32;
/// with `DoRA`, every 5th of some magnitudes, because a difference by `A` or `B` also moves the norms, which the gradient
/// counts as constants.
#[test]
fn gradients_of_the_loss_are_finite_differences() {
    let (a, b, magnitude) = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector");
    finite_differences(false, [("0.self_attn.q_proj", a), ("0.mlp.gate_proj", b), ("1.self_attn.v_proj", b)], 50);
    finite_differences(
        true,
        ["0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.v_proj"].map(|m| (m, magnitude)),
        5,
    );
}

fn finite_differences(dora: bool, names: [(&str, &str); 3], every: usize) {
    let vars = VarMap::new();
    let model = changed("qwen3", dora, &vars);
    let ids = ids("qwen3");
    let sequence = sequence(&[&ids[..12], &ids[12..24]]);
    let gradients = model.loss(&sequence, true).unwrap().0.backward().unwrap();
    let loss = || f64::from(model.loss(&sequence, false).unwrap().0.to_scalar::<f32>().unwrap());
    let map = vars.data().lock().unwrap().clone();
    for (module, part) in names {
        let name = format!("base_model.model.model.layers.{module}.{part}");
        let var = &map[&name];
        let (start, gradient) = (flat(var), flat(gradients.get(var).unwrap()));
        for place in (0..start.len()).step_by(every) {
            // The loss is of the size of 100 with an error of 1e-5; so differences over 2^-6 are good to 1e-3 and more.
            const STEP: f32 = 1.0 / 128.0;
            let moved = |step: f32| {
                let mut values = start.clone();
                values[place] += step;
                var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
                loss()
            };
            let slope = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
            let error = (slope - f64::from(gradient[place])).abs();
            assert!(error < 2e-2 * slope.abs().max(1.0), "{name} {place}: {slope}, {}", gradient[place]);
        }
        var.set(&Tensor::from_vec(start, var.shape(), var.device()).unwrap()).unwrap();
    }
}
