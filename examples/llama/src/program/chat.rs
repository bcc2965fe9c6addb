//! A chat on the terminal, and single prompts.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use core::time::Duration;
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Instant;
use std::{eprintln, print, println};

use anyhow::Result;

use super::Arguments;
use super::awake::awake;
use super::loaded::Loaded;
use crate::conversation::{Conversation, Engine, Prompt};

/// Answers one prompt.
pub(super) fn answer(loaded: &mut Loaded, arguments: &Arguments, prompt: &str) -> Result<()> {
    let mut conversation = loaded.conversation(arguments, arguments.first_adapter.as_deref())?;
    let start = Instant::now();
    let read = awake(|| {
        if arguments.raw {
            conversation.complete(&mut loaded.engine, prompt)
        } else {
            conversation.ask(&mut loaded.engine, prompt)
        }
    });
    print_answer(&mut loaded.engine, &mut conversation, arguments, read?, start.elapsed())
}

/// Reads what the user says, line by line, until the end of the input.
pub(super) fn run(loaded: &mut Loaded, arguments: &Arguments) -> Result<()> {
    let mut name = arguments.first_adapter.as_deref().unwrap_or("none").to_owned();
    let mut conversation = loaded.conversation(arguments, Some(&name))?;
    let names: String = loaded.engine.model.adapter_names().map(|name| format!(", {name}")).collect();
    eprintln!("Type a message, /adapter NAME (none{names}), /new, or /quit.");
    loop {
        print!("{name}> ");
        stdout().flush()?;
        let mut line = String::new();
        if stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(());
        }
        let line = line.trim();
        match line.split_once(' ').unwrap_or((line, "")) {
            ("", _) => {}
            ("/quit", _) => return Ok(()),
            ("/new", _) => conversation.restart(),
            ("/adapter", wanted) => match loaded.adapter(wanted.trim()) {
                Ok(adapter) => {
                    conversation.set_adapter(adapter);
                    wanted.trim().clone_into(&mut name);
                }
                Err(error) => eprintln!("{error}; there are none{names}"),
            },
            (command, _) if command.starts_with('/') => {
                eprintln!("{command}: not /adapter NAME, /new or /quit");
            }
            _ => {
                let start = Instant::now();
                // Whatever is wrong with one message, as that it is too long, the next may be better.
                let asked = awake(|| conversation.ask(&mut loaded.engine, line));
                let answered = asked.and_then(|prompt| {
                    print_answer(&mut loaded.engine, &mut conversation, arguments, prompt, start.elapsed())
                });
                if let Err(error) = answered {
                    eprintln!("{error:#}");
                }
            }
        }
    }
}

/// Prints an answer as it comes, and how long it took.
fn print_answer(
    engine: &mut Engine,
    conversation: &mut Conversation,
    arguments: &Arguments,
    prompt: Prompt,
    reading: Duration,
) -> Result<()> {
    let start = Instant::now();
    awake(|| -> Result<()> {
        while let Some(text) = conversation.step(engine, arguments.max_tokens)? {
            print!("{text}");
            stdout().flush()?;
        }
        Ok(())
    })?;
    println!();
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let decoded = conversation.decoded();
    eprintln!(
        "[prompt {} tokens, {:.1} tokens/s; decoding {decoded} tokens, {:.1} tokens/s; first logits {:016x}]",
        prompt.tokens,
        rate(prompt.tokens, reading),
        rate(decoded, start.elapsed()),
        prompt.hash,
    );
    Ok(())
}
