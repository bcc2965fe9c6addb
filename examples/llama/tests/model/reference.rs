//! The logits of the tiny models against transformers in f64.

use crate::tiny::{ALL, LLAMA, logits};
use nf4::{Arithmetic, Kernels};
use nf4_llama::{CacheType, Options};

/// The largest and the root mean square difference, over the root mean square of `exact`.
fn errors(got: &[f32], exact: &[f32]) -> (f64, f64) {
    assert_eq!(got.len(), exact.len());
    let square = |x: f64| x * x;
    let rms = (exact.iter().map(|x| square(f64::from(*x))).sum::<f64>() / exact.len() as f64).sqrt();
    let differences = || got.iter().zip(exact).map(|(g, e)| (f64::from(*g) - f64::from(*e)).abs());
    let mean = (differences().map(square).sum::<f64>() / exact.len() as f64).sqrt();
    (differences().fold(0.0, f64::max) / rms, mean / rms)
}

#[test]
fn every_family_agrees_with_transformers() {
    for tiny in ALL {
        for (arithmetic, bound) in
            [(Arithmetic::F32, 1e-5), (Arithmetic::SixteenByFour, 5e-3), (Arithmetic::EightByEight, 0.3)]
        {
            let model = tiny.load(Options { arithmetic, ..Options::default() });
            let (most, mean) = errors(&logits(&model, &tiny.ids(), None, CacheType::F32), &tiny.reference("exact"));
            println!(
                "{:<8} {arithmetic:?}: at most {most:.1e}, rms {mean:.1e}, on {}",
                tiny.name,
                Kernels::detect().isa()
            );
            assert!(most < bound, "{}, {arithmetic:?}: {most}", tiny.name);
        }
    }
}

#[test]
fn adapters_are_switched() {
    for (arithmetic, bound) in
        [(Arithmetic::F32, 1e-5), (Arithmetic::SixteenByFour, 2e-2), (Arithmetic::EightByEight, 0.5)]
    {
        let model = LLAMA.load_with_adapters(Options { arithmetic, ..Options::default() });
        let alone = LLAMA.load(Options { arithmetic, ..Options::default() });
        for (name, exact) in [("one", "adapter_one.exact"), ("two", "adapter_two.exact"), ("one", "adapter_one.exact")]
        {
            let adapter = Some(model.adapter(name).unwrap());
            let (most, _) = errors(&logits(&model, &LLAMA.ids(), adapter, CacheType::F32), &LLAMA.reference(exact));
            assert!(most < bound, "{name}, {arithmetic:?}: {most}");
        }
        // And back, to the bits of the model that never had one.
        let ids = LLAMA.ids();
        assert_eq!(logits(&model, &ids, None, CacheType::F32), logits(&alone, &ids, None, CacheType::F32));
    }
}
