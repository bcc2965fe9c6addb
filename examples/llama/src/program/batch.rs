//! Many prompts together, each with its own adapter.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::fs;
use std::path::Path;
use std::time::Instant;
use std::{eprintln, println};

use anyhow::{Context, Result, ensure};

use super::Arguments;
use super::awake::awake;
use super::loaded::Loaded;
use crate::cache::Cache;
use crate::conversation::Engine;
use crate::model::{AdapterId, Logits, Part};
use crate::sample::Sampler;
use crate::text::Message;
use crate::workspace::Workspace;

/// A prompt and what has been answered.
struct Sequence {
    prompt: String,
    name: String,
    adapter: Option<AdapterId>,
    cache: Cache,
    sampler: Sampler,
    /// The token that comes next; `None` at the end.
    next: Option<u32>,
    answer: Vec<u32>,
}

/// Answers the prompts of a file and prints them in its order.
pub(super) fn run(loaded: &mut Loaded, arguments: &Arguments, file: &Path) -> Result<()> {
    let content = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut sequences = Vec::new();
    let start = Instant::now();
    for (number, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || alloc::format!("{}, line {}", file.display(), number + 1);
        let (name, prompt) = line.split_once(": ").with_context(|| at() + ": not `NAME: text`")?;
        let adapter = loaded.adapter(name).with_context(at)?;
        let mut cache = loaded.cache(arguments)?;
        let Engine { model, text, workspace } = &mut loaded.engine;
        let system = arguments.system.iter().map(|text| Message { role: "system", content: text.clone() });
        let user = Message { role: "user", content: prompt.to_string() };
        let tokens = text.prompt(&system.chain([user]).collect::<Vec<_>>())?;
        let mut sampler = Sampler::new(arguments.sampling());
        let logits = awake(|| model.extend(&mut cache, &tokens, adapter, workspace)).with_context(at)?;
        let next = Some(sampler.choose(logits));
        let (prompt, name) = (prompt.into(), name.into());
        sequences.push(Sequence { prompt, name, adapter, cache, sampler, next, answer: Vec::new() });
    }
    ensure!(!sequences.is_empty(), "{}: no prompts", file.display());
    let Engine { model, text, .. } = &loaded.engine;
    let mut workspace = Workspace::new(model, sequences.len(), sequences.len())?;
    let prompts = start.elapsed();

    let (start, mut tokens) = (Instant::now(), 0);
    loop {
        for s in &mut sequences {
            let full = s.answer.len() >= arguments.max_tokens || s.cache.len() >= s.cache.positions();
            s.next = s.next.filter(|token| !text.is_end(*token) && !full);
            s.answer.extend(s.next);
        }
        let mut running: Vec<&mut Sequence> = sequences.iter_mut().filter(|s| s.next.is_some()).collect();
        if running.is_empty() {
            break;
        }
        tokens += running.len();
        let next: Vec<u32> = running.iter().filter_map(|s| s.next).collect();
        let parts = running.iter_mut().zip(next.chunks(1));
        let mut parts: Vec<Part<'_>> =
            parts.map(|(s, tokens)| Part { cache: &mut s.cache, tokens, adapter: s.adapter }).collect();
        let logits = awake(|| model.forward(&mut parts, Logits::Last, &mut workspace))?;
        for (s, logits) in running.iter_mut().zip(logits.chunks_exact(model.config().vocabulary)) {
            s.next = Some(s.sampler.choose(logits));
        }
    }
    let rate = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
    for s in &sequences {
        println!("[{}] {}\n{}\n", s.name, s.prompt, text.decode(&s.answer)?);
    }
    eprintln!(
        "[{} prompts in {:.2} s; decoding {tokens} tokens, {rate:.1} tokens/s]",
        sequences.len(),
        prompts.as_secs_f64()
    );
    Ok(())
}
