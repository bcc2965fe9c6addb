//! A conversation with a model: what was said, and the answer token by token.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use anyhow::Result;

use crate::cache::Cache;
use crate::math::hash;
use crate::model::{AdapterId, Model};
use crate::sample::{Sampler, Sampling};
use crate::text::{Message, Stream, Text};
use crate::workspace::Workspace;

/// What any conversation runs on.
#[derive(Debug)]
pub struct Engine {
    /// The model.
    pub model: Model,
    /// Its tokenizer and template.
    pub text: Text,
    /// Buffers.
    pub workspace: Workspace,
}

/// The messages of a conversation, and a cache of what the model has read of them.
#[derive(Debug)]
pub struct Conversation {
    system: Option<String>,
    sampling: Sampling,
    messages: Vec<Message>,
    adapter: Option<AdapterId>,
    cache: Cache,
    /// The tokens that the cache stands for.
    cached: Vec<u32>,
    sampler: Sampler,
    answer: Answer,
}

/// An answer that is under way.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    stream: Stream,
    /// The first token, which was chosen with the prompt.
    first: Option<u32>,
    decoded: usize,
    /// Whether it is to become a message.
    chat: bool,
    ended: bool,
}

/// What a model has read before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt {
    /// Tokens that were new to the cache.
    pub tokens: usize,
    /// The hash of the logits after the last one.
    pub hash: u64,
}

impl Conversation {
    /// A conversation that begins.
    #[must_use]
    pub fn new(cache: Cache, sampling: Sampling, system: Option<String>) -> Self {
        let mut conversation = Self {
            system,
            sampling,
            messages: Vec::new(),
            adapter: None,
            cache,
            cached: Vec::new(),
            sampler: Sampler::new(sampling),
            answer: Answer::default(),
        };
        conversation.restart();
        conversation
    }

    /// Forgets what was said, and begins with the first of the random numbers again.
    pub fn restart(&mut self) {
        self.sampler = Sampler::new(self.sampling);
        let system = self.system.iter().map(|text| Message { role: "system", content: text.clone() });
        self.messages = system.collect();
        self.answer = Answer::default();
    }

    /// Changes the adapter of all that follows, and ends an answer that is under way. The whole conversation will be read
    /// again with it.
    pub fn set_adapter(&mut self, adapter: Option<AdapterId>) {
        if adapter != self.adapter {
            self.adapter = adapter;
            self.answer.ended = true;
            self.cut(0);
        }
    }

    /// Reads a message of the user. [`Self::step`] then gives the answer.
    ///
    /// # Errors
    /// The errors of [`Text::prompt`] and [`Model::extend`], as if there is no room in the cache. The message is forgotten
    /// then.
    pub fn ask(&mut self, engine: &mut Engine, message: &str) -> Result<Prompt> {
        self.finish(&engine.text)?;
        self.messages.push(Message { role: "user", content: message.to_string() });
        let tokens = engine.text.prompt(&self.messages);
        let prompt = tokens.and_then(|tokens| self.read(engine, &tokens));
        match prompt {
            Ok(_) => self.answer.chat = true,
            Err(_) => drop(self.messages.pop()),
        }
        prompt
    }

    /// Reads a text as it is, without the template of a chat; the answer continues it.
    ///
    /// # Errors
    /// The errors of [`Self::ask`].
    pub fn complete(&mut self, engine: &mut Engine, text: &str) -> Result<Prompt> {
        let tokens = engine.text.encode(text, true)?;
        self.read(engine, &tokens)
    }

    fn read(&mut self, engine: &mut Engine, tokens: &[u32]) -> Result<Prompt> {
        self.answer = Answer::default();
        anyhow::ensure!(!tokens.is_empty(), "a text without tokens");
        let same = self.cached.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // The last token's logits are needed.
        let same = same.min(tokens.len() - 1);
        self.cut(same);
        let Engine { model, workspace, .. } = engine;
        match model.extend(&mut self.cache, &tokens[same..], self.adapter, workspace) {
            Ok(logits) => {
                self.cached.extend(&tokens[same..]);
                self.answer.first = Some(self.sampler.choose(logits));
                Ok(Prompt { tokens: tokens.len() - same, hash: hash(logits) })
            }
            Err(error) => {
                // Some of the tokens may be there.
                self.cut(same);
                Err(error.into())
            }
        }
    }

    /// The text that the next token of the answer adds, which may be empty; `None` at its end, or if it has
    /// `max_tokens`, or if the cache is full.
    ///
    /// # Errors
    /// If the tokenizer fails; those of [`Model::extend`].
    pub fn step(&mut self, engine: &mut Engine, max_tokens: usize) -> Result<Option<String>> {
        let full = self.answer.tokens.len() >= max_tokens || self.cache.len() >= self.cache.positions();
        let token = match (self.answer.first.take(), self.answer.tokens.last()) {
            _ if full || self.answer.ended => None,
            (Some(token), _) => Some(token),
            (None, Some(&last)) => {
                let logits = engine.model.extend(&mut self.cache, &[last], self.adapter, &mut engine.workspace)?;
                self.cached.push(last);
                self.answer.decoded += 1;
                Some(self.sampler.choose(logits))
            }
            (None, None) => None,
        };
        match token.filter(|token| !engine.text.is_end(*token)) {
            Some(token) => {
                self.answer.tokens.push(token);
                self.answer.stream.push(&engine.text, token).map(Some)
            }
            None if self.answer.ended => self.finish(&engine.text).map(|()| None),
            // What no further token completes.
            None => {
                self.finish(&engine.text)?;
                self.answer.stream.rest(&engine.text).map(|rest| Some(rest).filter(|rest| !rest.is_empty()))
            }
        }
    }

    /// Tokens that were computed one by one for the answer so far: all but the first, which comes with the prompt.
    #[must_use]
    pub fn decoded(&self) -> usize {
        self.answer.decoded
    }

    /// Makes a message of what has been answered.
    fn finish(&mut self, text: &Text) -> Result<()> {
        self.answer.ended = true;
        if core::mem::take(&mut self.answer.chat) {
            self.messages.push(Message { role: "assistant", content: text.decode(&self.answer.tokens)? });
        }
        Ok(())
    }

    fn cut(&mut self, len: usize) {
        self.cache.truncate(len);
        self.cached.truncate(len);
    }
}
