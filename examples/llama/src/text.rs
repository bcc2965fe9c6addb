//! Text to tokens and back, and the template of a chat.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use anyhow::{Context, Result, anyhow, bail};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

/// The files of a model that are about text, as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct TextFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub config: Option<&'a [u8]>,
    /// `chat_template.jinja`, which comes before the template in `tokenizer_config.json`.
    pub template: Option<&'a [u8]>,
    /// `generation_config.json`.
    pub generation: Option<&'a [u8]>,
}

/// The tokenizer and the chat template of a model.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<String>,
    /// The texts of special tokens, for the template: `bos_token`, `eos_token`.
    special: Map<String, Value>,
    end_tokens: Vec<u32>,
}

/// Who says something in a chat, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
}

impl Text {
    /// Parses the files. `end_tokens` are those of `config.json`; those of `generation_config.json` and the tokenizer's
    /// `eos_token` are added.
    ///
    /// # Errors
    /// If one of them is not understood; the message names it.
    pub fn new(files: TextFiles<'_>, end_tokens: &[u32]) -> Result<Self> {
        let tokenizer = Tokenizer::from_bytes(files.tokenizer).map_err(|e| anyhow!("tokenizer.json: {e}"))?;
        let config = object("tokenizer_config.json", files.config)?;
        let generation = object("generation_config.json", files.generation)?;
        let template = match files.template {
            Some(text) => Some(core::str::from_utf8(text).context("chat_template.jinja")?.to_string()),
            None => template_of(&config),
        };
        let mut special = Map::new();
        for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let token = config.get(name).map(|token| token.get("content").unwrap_or(token));
            if let Some(text) = token.and_then(Value::as_str) {
                special.insert(name.to_string(), text.into());
            }
        }
        let mut end_tokens = end_tokens.to_vec();
        let generated = generation.get("eos_token_id");
        let listed = generated.into_iter().flat_map(|v| v.as_array().map_or(core::slice::from_ref(v), Vec::as_slice));
        end_tokens.extend(listed.filter_map(|v| u32::try_from(v.as_u64()?).ok()));
        end_tokens.extend(special.get("eos_token").and_then(|text| tokenizer.token_to_id(text.as_str()?)));
        end_tokens.sort_unstable();
        end_tokens.dedup();
        Ok(Self { tokenizer, template, special, end_tokens })
    }

    /// The tokens of a text. Names of special tokens in it become those tokens; `add_special` also adds what the
    /// tokenizer puts around a text by itself.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, add_special).map_err(|e| anyhow!("tokenizer: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, without the special ones.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|e| anyhow!("tokenizer: {e}"))
    }

    /// Whether a text ends with this token.
    #[must_use]
    pub fn is_end(&self, token: u32) -> bool {
        self.end_tokens.contains(&token)
    }

    /// Whether the model has a chat template.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The tokens that a model reads of a chat: by its template; a model without one continues the last message.
    ///
    /// # Errors
    /// If the template refuses the messages, or the tokenizer fails.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        if self.has_template() {
            return self.encode(&self.chat(messages)?, false);
        }
        self.encode(messages.last().map_or("", |message| &message.content), true)
    }

    /// The text of a chat up to where the assistant is to speak.
    ///
    /// # Errors
    /// If the model has no template, or it refuses the messages.
    pub fn chat(&self, messages: &[Message]) -> Result<String> {
        self.render(messages, true)
    }

    /// The text of a chat; with `prompt` as [`Self::chat`], without it up to the end of the last message.
    ///
    /// # Errors
    /// The errors of [`Self::chat`].
    pub fn render(&self, messages: &[Message], prompt: bool) -> Result<String> {
        let Some(template) = &self.template else { bail!("the model has no chat template") };
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // As transformers sets it.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template("chat", template).context("chat template")?;
        let mut values = self.special.clone();
        let messages: Vec<Value> = messages.iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
        values.insert("messages".to_string(), messages.into());
        values.insert("add_generation_prompt".to_string(), prompt.into());
        environment.get_template("chat").and_then(|template| template.render(values)).context("chat template")
    }
}

/// Turns tokens into text as they come.
#[derive(Debug, Clone, Default)]
pub struct Stream {
    tokens: Vec<u32>,
    /// The first token that is decoded again with the new ones, because spaces depend on what stands before.
    start: usize,
    /// Tokens whose text has been given.
    read: usize,
}

impl Stream {
    /// The text that a further token completes; empty in the middle of a character. `text` is always the same.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn push(&mut self, text: &Text, token: u32) -> Result<String> {
        self.tokens.push(token);
        let new = self.rest(text)?;
        if new.is_empty() || new.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        (self.start, self.read) = (self.read, self.tokens.len());
        Ok(new)
    }

    /// The text of the tokens that have completed none: what is left at the end.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn rest(&self, text: &Text) -> Result<String> {
        let before = text.decode(&self.tokens[self.start..self.read])?;
        let whole = text.decode(&self.tokens[self.start..])?;
        Ok(whole.get(before.len()..).unwrap_or_default().to_string())
    }
}

fn object(name: &'static str, text: Option<&[u8]>) -> Result<Map<String, Value>> {
    text.map_or(Ok(Map::new()), |text| serde_json::from_slice(text).context(name))
}

/// One template, or the one called `default` of several.
fn template_of(config: &Map<String, Value>) -> Option<String> {
    let value = config.get("chat_template")?;
    let named = |v: &&Value| v.get("name").is_some_and(|name| name == "default");
    let text = value.as_array().map_or(Some(value), |list| list.iter().find(named)?.get("template"));
    text.and_then(Value::as_str).map(ToString::to_string)
}
