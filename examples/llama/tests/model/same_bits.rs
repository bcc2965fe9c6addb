//! One hash of the logits, whatever the instruction set, the batch, and the cuts of a prompt.

use std::sync::Arc;

use crate::tiny::{ALL, LLAMA, logits};
use nf4::{Arithmetic, Kernels, Threads};
use nf4_llama::{Cache, CacheType, Logits, Model, Options, Part, Workspace, hash};

/// Of all logits of the tiny Llama, in each arithmetic.
const HASHES: [(Arithmetic, u64); 3] = [
    (Arithmetic::F32, 0xe0aa_379d_d490_e699),
    (Arithmetic::SixteenByFour, 0x8ed1_ca0e_7409_a765),
    (Arithmetic::EightByEight, 0x67f0_90a8_0d3a_b8a6),
];

#[test]
fn every_instruction_set_gives_the_committed_hashes() {
    let required = option_env!("NF4_REQUIRE_ISA").map(str::to_owned).or_else(|| std::env::var("NF4_REQUIRE_ISA").ok());
    let mut found = false;
    for kernels in Kernels::available() {
        let got = HASHES.map(|(arithmetic, _)| {
            let model = LLAMA.load(Options { arithmetic, kernels, ..Options::default() });
            hash(&logits(&model, &LLAMA.ids(), None, CacheType::F32))
        });
        println!("logits {:<13} f32 {:016x} 16x4 {:016x} 8x8 {:016x}", kernels.isa(), got[0], got[1], got[2]);
        assert_eq!(got, HASHES.map(|(_, hash)| hash), "{}", kernels.isa());
        found |= required.as_deref() == Some(kernels.isa().name());
    }
    assert!(found || required.is_none(), "no kernels {required:?}");
}

/// A pool that takes the second half first, on the thread that calls: cuts as many threads would, also where there are
/// none.
struct Backwards(usize);

impl Threads for Backwards {
    fn count(&self) -> usize {
        self.0
    }

    fn join(&self, a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
        b();
        a();
    }
}

#[test]
fn threads_change_nothing() {
    for tiny in ALL {
        let load = |threads| tiny.load(Options { threads, ..Options::default() });
        let ids = tiny.ids();
        let alone = hash(&logits(&load(None), &ids, None, CacheType::F16));
        for count in [1, 2, 3, 7, 400] {
            let model = load(Some(Arc::new(Backwards(count))));
            assert_eq!(hash(&logits(&model, &ids, None, CacheType::F16)), alone, "{}, {count} threads", tiny.name);
            let each = in_passes(&model, &ids[..5], &[1, 2, 3, 4], CacheType::F16);
            let whole = in_passes(&load(None), &ids[..5], &[], CacheType::F16);
            assert_eq!(hash(&each), hash(&whole), "{}, {count} threads", tiny.name);
        }
    }
}

/// The logits of every token, computed in passes that end at `cuts`.
fn in_passes(model: &Model, ids: &[u32], cuts: &[usize], kind: CacheType) -> Vec<f32> {
    let mut workspace = Workspace::new(model, ids.len(), ids.len()).unwrap();
    let mut cache = Cache::new(model.config(), ids.len(), kind).unwrap();
    let (mut all, mut start) = (Vec::new(), 0);
    for end in cuts.iter().copied().chain([ids.len()]) {
        let parts = &mut [Part { cache: &mut cache, tokens: &ids[start..end], adapter: None }];
        all.extend_from_slice(model.forward(parts, Logits::All, &mut workspace).unwrap());
        start = end;
    }
    all
}

#[test]
fn cuts_change_nothing() {
    let ids = LLAMA.ids();
    let each: Vec<usize> = (1..ids.len()).collect();
    for (arithmetic, _) in HASHES {
        let model = LLAMA.load(Options { arithmetic, ..Options::default() });
        for kind in [CacheType::F32, CacheType::F16] {
            let whole = hash(&in_passes(&model, &ids, &[], kind));
            for cuts in [&each[..], &[1], &[63], &[64], &[65], &[13, 14, 40]] {
                assert_eq!(hash(&in_passes(&model, &ids, cuts, kind)), whole, "{arithmetic:?} {kind:?} {cuts:?}");
            }
        }
    }
}

/// A cache in f16 rounds, but not much.
#[test]
fn caches_in_f16_are_near() {
    let model = LLAMA.load(Options { arithmetic: Arithmetic::F32, ..Options::default() });
    let [a, b] = [CacheType::F32, CacheType::F16].map(|kind| logits(&model, &LLAMA.ids(), None, kind));
    let most = a.iter().zip(&b).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    // Logits have an rms of 4, and keys and values are rounded to 11 bits.
    assert!(most > 0.0 && most < 0.05, "{most}");
}

#[test]
fn sequences_of_a_batch_do_not_meet() {
    let model = LLAMA.load_with_adapters(Options::default());
    let adapters = [None, Some(model.adapter("one").unwrap()), Some(model.adapter("two").unwrap())];
    let ids = LLAMA.ids();
    let tokens = [&ids[..10], &ids[5..30], &ids[30..31]];
    let alone: Vec<f32> = (0..3).flat_map(|n| logits(&model, tokens[n], adapters[n], CacheType::F32)).collect();
    let mut caches = [0; 3].map(|_| Cache::new(model.config(), 64, CacheType::F32).unwrap());
    let mut workspace = Workspace::new(&model, 40, 40).unwrap();
    let mut parts: Vec<Part<'_>> = caches
        .iter_mut()
        .zip(tokens.iter().zip(adapters))
        .map(|(cache, (tokens, adapter))| Part { cache, tokens, adapter })
        .collect();
    let together = model.forward(&mut parts, Logits::All, &mut workspace).unwrap();
    assert_eq!(hash(together), hash(&alone));
}

/// A cache that is cut back is as one that never had more.
#[test]
fn caches_are_cut_back() {
    let model = LLAMA.load(Options::default());
    let ids = LLAMA.ids();
    let mut workspace = Workspace::new(&model, 70, 1).unwrap();
    for len in [0, 1, 40, 63, 64, 65] {
        let [mut used, mut fresh] = [0; 2].map(|_| Cache::new(model.config(), 128, CacheType::F32).unwrap());
        model.extend(&mut used, &ids, None, &mut workspace).unwrap();
        used.truncate(len);
        assert_eq!(used.len(), len);
        let used = hash(model.extend(&mut used, &ids[len..], None, &mut workspace).unwrap());
        assert_eq!(used, hash(model.extend(&mut fresh, &ids, None, &mut workspace).unwrap()), "{len}");
    }
}

/// The prompt in batches of the workspace.
#[test]
fn prompts_are_longer_than_a_workspace() {
    let model = LLAMA.load(Options::default());
    let ids = LLAMA.ids();
    let hashes = [1, 7, 69, 70, 71].map(|tokens| {
        let mut workspace = Workspace::new(&model, tokens, 1).unwrap();
        let mut cache = Cache::new(model.config(), 128, CacheType::F32).unwrap();
        hash(model.extend(&mut cache, &ids, None, &mut workspace).unwrap())
    });
    assert_eq!(hashes, [hashes[0]; 5]);
}
