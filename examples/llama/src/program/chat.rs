//! A chat on the terminal, and single prompts.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Instant;
use std::{eprintln, print, println};

use anyhow::Result;

use super::Arguments;
use super::loaded::Loaded;
use crate::cache::Cache;
use crate::math::hash;
use crate::model::AdapterId;
use crate::sample::Sampler;
use crate::text::Message;

/// What an answer took.
struct Speed {
    prompt: (usize, Duration),
    decoding: (usize, Duration),
    /// Of the first logits.
    hash: u64,
}

impl Speed {
    fn print(&self) {
        let rate = |(tokens, time): (usize, Duration)| tokens as f64 / time.as_secs_f64().max(1e-9);
        eprintln!(
            "[prompt {} tokens, {:.1} tokens/s; decoding {} tokens, {:.1} tokens/s; first logits {:016x}]",
            self.prompt.0,
            rate(self.prompt),
            self.decoding.0,
            rate(self.decoding),
            self.hash,
        );
    }
}

/// Answers one prompt.
pub(super) fn answer(loaded: &mut Loaded, arguments: &Arguments, prompt: &str) -> Result<()> {
    let adapter = loaded.adapter(arguments.first_adapter.as_deref().unwrap_or("none"))?;
    let text = loaded.text()?;
    let tokens = if arguments.raw || !text.has_template() {
        text.encode(prompt, true)?
    } else {
        text.encode(&text.chat(&opening(arguments, Some(prompt)))?, false)?
    };
    let mut cache = loaded.cache(arguments)?;
    let mut sampler = Sampler::new(arguments.sampling());
    let (_, speed) = generate(loaded, arguments, &mut cache, &tokens, adapter, &mut sampler)?;
    speed.print();
    Ok(())
}

/// Reads what the user says, line by line, until the end of the input.
pub(super) fn run(loaded: &mut Loaded, arguments: &Arguments) -> Result<()> {
    let mut adapter_name = arguments.first_adapter.clone().unwrap_or_else(|| "none".to_string());
    let mut adapter = loaded.adapter(&adapter_name)?;
    let mut messages = opening(arguments, None);
    let mut cache = loaded.cache(arguments)?;
    // The tokens that the cache stands for.
    let mut cached: Vec<u32> = Vec::new();
    let mut sampler = Sampler::new(arguments.sampling());
    let names: Vec<&str> = loaded.model.adapter_names().collect();
    eprintln!(
        "Type a message, /adapter NAME (none{}), /new, or /quit.",
        names.iter().map(|n| format!(", {n}")).collect::<String>()
    );
    loop {
        print!("{adapter_name}> ");
        stdout().flush()?;
        let mut line = String::new();
        if stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(());
        }
        let line = line.trim();
        match line.split_once(' ').unwrap_or((line, "")) {
            ("", _) => continue,
            ("/quit", _) => return Ok(()),
            ("/new", _) => messages = opening(arguments, None),
            ("/adapter", name) => match loaded.adapter(name.trim()) {
                Ok(found) => {
                    // What the cache holds was computed with the other adapter.
                    cache.truncate(0);
                    cached.clear();
                    (adapter, adapter_name) = (found, name.trim().to_string());
                }
                Err(error) => eprintln!("{error}"),
            },
            _ => {
                messages.push(Message { role: "user", content: line.to_string() });
                let text = loaded.text()?;
                let tokens = text.encode(&text.chat(&messages)?, false)?;
                let mut same = cached.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
                // The last token's logits are needed.
                same = same.min(tokens.len().saturating_sub(1));
                cache.truncate(same);
                cached.truncate(same);
                let (answer, speed) = generate(loaded, arguments, &mut cache, &tokens[same..], adapter, &mut sampler)?;
                cached.extend(&tokens[same..]);
                cached.extend(&answer[..cache.len() - cached.len()]);
                speed.print();
                messages.push(Message { role: "assistant", content: loaded.text()?.decode(&answer)? });
            }
        }
    }
}

/// The messages before the first answer.
pub(super) fn opening(arguments: &Arguments, user: Option<&str>) -> Vec<Message> {
    let system = arguments.system.as_ref().map(|text| Message { role: "system", content: text.clone() });
    let user = user.map(|text| Message { role: "user", content: text.to_string() });
    system.into_iter().chain(user).collect()
}

/// Prints the continuation of `tokens` as it comes, and returns its tokens.
fn generate(
    loaded: &mut Loaded,
    arguments: &Arguments,
    cache: &mut Cache,
    tokens: &[u32],
    adapter: Option<AdapterId>,
    sampler: &mut Sampler,
) -> Result<(Vec<u32>, Speed)> {
    let Loaded { model, text, workspace, .. } = loaded;
    let Some(text) = text.as_ref() else { return Err(anyhow::anyhow!("the model has no tokenizer.json")) };
    let start = Instant::now();
    let mut logits = model.extend(cache, tokens, adapter, workspace)?;
    let prompt = (tokens.len(), start.elapsed());
    let hash = hash(logits);
    let (mut answer, mut stream) = (Vec::new(), text.stream());
    let start = Instant::now();
    let mut decoded = 0;
    while answer.len() < arguments.max_tokens && cache.len() < cache.positions() {
        let token = sampler.choose(logits);
        if text.is_end(token) {
            break;
        }
        answer.push(token);
        print!("{}", stream.push(token)?);
        stdout().flush()?;
        logits = model.extend(cache, &[token], adapter, workspace)?;
        decoded += 1;
    }
    println!();
    Ok((answer, Speed { prompt, decoding: (decoded, start.elapsed()), hash }))
}
