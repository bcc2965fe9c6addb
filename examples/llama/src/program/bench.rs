//! Tokens per second.

use alloc::vec::Vec;
use std::println;
use std::time::Instant;

use anyhow::Result;

use super::awake::awake;
use super::loaded::Loaded;
use crate::cache::{Cache, CacheType};
use crate::conversation::Engine;
use crate::sample::argmax;

const PROMPT: usize = 512;
const DECODED: usize = 64;

/// Times a prompt of 512 tokens, and decoding of 64 tokens after a prompt of 16, as `llama-bench` does from an almost
/// empty cache; medians of `repeats`.
pub(super) fn run(loaded: &mut Loaded, threads: usize, repeats: usize) -> Result<()> {
    let Engine { model, workspace, .. } = &mut loaded.engine;
    let vocabulary = u32::try_from(model.config().vocabulary)?;
    // Any tokens will do; these are spread over the vocabulary.
    let prompt: Vec<u32> = (0..512).map(|i: u32| i.wrapping_mul(2_654_435_761) % vocabulary).collect();
    let mut cache = Cache::new(model.config(), (PROMPT + DECODED).min(model.config().positions), CacheType::F32)?;
    let (mut prompts, mut decodings) = (Vec::new(), Vec::new());
    // What is touched for the first time.
    model.extend(&mut cache, &prompt, None, workspace)?;
    for _ in 0..repeats.max(1) {
        cache.truncate(0);
        let start = Instant::now();
        awake(|| model.extend(&mut cache, &prompt, None, workspace).map(|_| ()))?;
        prompts.push(PROMPT as f64 / start.elapsed().as_secs_f64());

        cache.truncate(0);
        let mut token = argmax(model.extend(&mut cache, &prompt[..16], None, workspace)?);
        let start = Instant::now();
        awake(|| -> Result<()> {
            for _ in 0..DECODED {
                token = argmax(model.extend(&mut cache, &[token], None, workspace)?);
            }
            Ok(())
        })?;
        decodings.push(DECODED as f64 / start.elapsed().as_secs_f64());
    }
    for (what, rates) in [("prompt of 512", &mut prompts), ("decoding", &mut decodings)] {
        rates.sort_by(f64::total_cmp);
        println!("{threads} threads, {what}: {:.1} tokens/s", rates[rates.len() / 2]);
    }
    Ok(())
}
