//! A token allocates nothing after the first.

use nf4::Arithmetic;
use nf4_llama::{Cache, CacheType, Logits, Options, Part, Sampler, Sampling, Workspace};

use crate::tiny::ALL;

#[test]
fn tokens_allocate_nothing() {
    for tiny in ALL {
        for (arithmetic, quantize_head) in
            [(Arithmetic::SixteenByFour, false), (Arithmetic::EightByEight, false), (Arithmetic::F32, true)]
        {
            let options = Options { arithmetic, quantize_head, ..Options::default() };
            let model = if tiny.name == "llama" { tiny.load_with_adapters(options) } else { tiny.load(options) };
            let adapter = model.adapter("one").ok();
            for kind in [CacheType::F32, CacheType::F16] {
                let mut workspace = Workspace::new(&model, 8, 2).unwrap();
                let mut caches = [0; 2].map(|_| Cache::new(model.config(), 128, kind).unwrap());
                let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_k: 20, top_p: 0.9, seed: 1 });
                let mut token = 1;
                let mut step = |token: &mut u32, count: usize| {
                    let tokens = [*token; 3];
                    let [a, b] = &mut caches;
                    let parts = &mut [
                        Part { cache: a, tokens: &tokens[..count], adapter },
                        Part { cache: b, tokens: &tokens[..1], adapter: None },
                    ];
                    let logits = model.forward(parts, Logits::Last, &mut workspace).unwrap();
                    *token = sampler.choose(&logits[..model.config().vocabulary]);
                };
                step(&mut token, 1);
                let info = allocation_counter::measure(|| {
                    for count in [1, 3, 1, 1] {
                        step(&mut token, count);
                    }
                });
                assert_eq!(info.count_total, 0, "{} {arithmetic:?} {kind:?}", tiny.name);
            }
        }
    }
}
