//! A text file or chats as tokens.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nf4_llama::{Message, Text};
use serde_json::Value;

/// Tokens that belong together: a chat, or a piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    tokens: Vec<u32>,
    learned: Vec<bool>,
    line: usize,
}

impl Document {
    /// Tokens, for each whether it is to be learned, and the line that they came from.
    #[must_use]
    pub fn new(tokens: Vec<u32>, learned: Vec<bool>, line: usize) -> Self {
        Self { tokens, learned, line }
    }

    /// The tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// For each token, whether it is to be learned.
    #[must_use]
    pub fn learned(&self) -> &[bool] {
        &self.learned
    }

    /// The line of the file, from 1.
    #[must_use]
    pub fn line(&self) -> usize {
        self.line
    }

    /// Whether anything can be learned from it: not from the first token, which nothing predicts.
    fn has_targets(&self) -> bool {
        self.learned.iter().skip(1).any(|learned| *learned)
    }

    fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.learned.truncate(len);
    }
}

/// The documents of a file, and what had to be said about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// The documents, in the order of the file.
    pub documents: Vec<Document>,
    /// For the user: lines that were cut or left out.
    pub warnings: Vec<String>,
}

impl Data {
    /// Reads a file: chats if its name ends with `.jsonl`, else a text.
    ///
    /// # Errors
    /// If the file cannot be read or is not UTF-8; those of [`Self::text`] and [`Self::chats`].
    pub fn read(path: &Path, text: &Text, context: usize) -> Result<Self> {
        let at = || path.display().to_string();
        let content = fs::read_to_string(path).with_context(at)?;
        let is_jsonl = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
        let data = if is_jsonl { Self::chats(&content, text, context) } else { Self::text(&content, text, context) };
        data.with_context(at)
    }

    /// A text, cut into pieces of `context` tokens. Each piece starts with the last token of the one before, so that every
    /// token but the first is learned once.
    ///
    /// # Errors
    /// If there are fewer than two tokens.
    pub fn text(content: &str, text: &Text, context: usize) -> Result<Self> {
        let tokens = text.encode(content, false)?;
        ensure!(tokens.len() >= 2, "there is nothing to learn: {} tokens", tokens.len());
        let stride = context.saturating_sub(1).max(1);
        let piece = |start: usize| {
            let tokens = tokens[start..(start + context).min(tokens.len())].to_vec();
            Document { learned: vec![true; tokens.len()], tokens, line: 1 }
        };
        let documents = (0..tokens.len() - 1).step_by(stride).map(piece).collect();
        Ok(Self { documents, warnings: Vec::new() })
    }

    /// Chats, one a line: `{"messages": [{"role": "user", "content": "..."}, ...]}` with the roles `system`, `user` and
    /// `assistant`, put into the template of the model. What the assistant says is learned. Empty lines are left out; chats
    /// of more than `context` tokens are cut, and left out if no answer remains, both with a warning.
    ///
    /// # Errors
    /// A message with the line for one that is not such an object, has no answer, or is refused by the template; if there is
    /// no chat to learn from.
    pub fn chats(content: &str, text: &Text, context: usize) -> Result<Self> {
        let (mut documents, mut warnings) = (Vec::new(), Vec::new());
        for (index, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line_number = index + 1;
            let mut document = chat(line, text, line_number).with_context(|| format!("line {line_number}"))?;
            let len = document.tokens.len();
            if len > context {
                document.truncate(context);
                let kept = document.has_targets();
                let done = if kept { "cut" } else { "left out, because no answer fits" };
                warnings
                    .push(format!("line {line_number}: {len} tokens are more than the context of {context}: {done}"));
                if !kept {
                    continue;
                }
            }
            documents.push(document);
        }
        if documents.is_empty() {
            bail!(
                "there is nothing to learn: no chats{}",
                warnings.first().map_or(String::new(), |w| format!(" fit; {w}"))
            );
        }
        Ok(Self { documents, warnings })
    }
}

fn chat(line: &str, text: &Text, line_number: usize) -> Result<Document> {
    let value: Value = serde_json::from_str(line).context("not JSON")?;
    let list = value.get("messages").and_then(Value::as_array).context("no array \"messages\"")?;
    let messages = list.iter().enumerate().map(|(n, message)| {
        let field = |name: &str| {
            let value = message.get(name).and_then(Value::as_str);
            value.with_context(|| format!("message {}: no text \"{name}\"", n + 1))
        };
        let role = match field("role")? {
            "system" => "system",
            "user" => "user",
            "assistant" => "assistant",
            other => bail!("message {}: the role {other:?} is not system, user or assistant", n + 1),
        };
        Ok(Message { role, content: field("content")?.to_string() })
    });
    let messages: Vec<Message> = messages.collect::<Result<_>>()?;
    let mut document = Document { tokens: Vec::new(), learned: Vec::new(), line: line_number };
    let mut before = String::new();
    for (n, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        // Up to the answer, and with it: encoded apart, as they are when the model answers.
        let prompt = text.render(&messages[..n], true)?;
        let answered = text.render(&messages[..=n], false)?;
        for (whole, learned) in [(prompt, false), (answered, true)] {
            let Some(new) = whole.strip_prefix(&before) else {
                bail!("the template of the model writes message {} differently with what follows it", n + 1);
            };
            let tokens = text.encode(new, false)?;
            document.learned.resize(document.learned.len() + tokens.len(), learned);
            document.tokens.extend(tokens);
            before = whole;
        }
    }
    ensure!(document.has_targets(), "no answer of an assistant");
    Ok(document)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

    use nf4_llama::TextFiles;

    use super::*;

    fn text() -> Text {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../llama/tests/data/llama");
        let read = |name: &str| fs::read(format!("{folder}/{name}")).unwrap();
        let config = br#"{"chat_template": "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"}"#;
        Text::new(TextFiles { tokenizer: &read("tokenizer.json"), config: Some(config), ..TextFiles::default() }, &[])
            .unwrap()
    }

    const CHAT: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}]}"#;

    #[test]
    fn answers_are_learned() {
        let text = text();
        let data = Data::chats(&format!("\n{CHAT}\n"), &text, 100).unwrap();
        assert_eq!(data.warnings, Vec::<String>::new());
        let [document] = data.documents.as_slice() else { panic!("one chat") };
        assert_eq!(document.line(), 2);
        let learned = |wanted: bool| {
            let pairs = document.tokens().iter().zip(document.learned());
            let tokens: Vec<u32> = pairs.filter(|(_, learned)| **learned == wanted).map(|(token, _)| *token).collect();
            text.decode(&tokens).unwrap()
        };
        assert_eq!(learned(true), "yo\nso long\n");
        assert_eq!(learned(false), "<u>hi\n<a><u>bye\n<a>");
    }

    #[test]
    fn wrong_lines_are_named() {
        let error = |content: &str| format!("{:#}", Data::chats(content, &text(), 100).unwrap_err());
        assert!(error("").contains("nothing to learn"));
        assert!(error("\n\n").contains("nothing to learn"));
        let wrong = [
            ("{", "not JSON"),
            ("[1]", "messages"),
            (r#"{"messages": "hi"}"#, "messages"),
            (r#"{"messages": []}"#, "no answer"),
            (r#"{"messages": [{"role": "user", "content": "hi"}]}"#, "no answer"),
            (r#"{"messages": [{"role": "tool", "content": "hi"}]}"#, "tool"),
            (r#"{"messages": [{"role": "user"}]}"#, "message 1: no text \"content\""),
        ];
        for (line, expected) in wrong {
            let message = error(&format!("{CHAT}\n{line}\n"));
            assert!(message.contains("line 2") && message.contains(expected), "{line}: {message}");
        }
    }

    #[test]
    fn long_chats_are_cut_with_a_warning() {
        let text = text();
        let all = Data::chats(CHAT, &text, 1000).unwrap().documents[0].tokens().len();
        let cut = Data::chats(CHAT, &text, all - 1).unwrap();
        assert_eq!(cut.documents[0].tokens().len(), all - 1);
        assert_eq!(cut.warnings, [format!("line 1: {all} tokens are more than the context of {}: cut", all - 1)]);
        // Nothing of the first answer fits: the chat goes, and with it the only one.
        let error = Data::chats(CHAT, &text, 4).unwrap_err().to_string();
        assert!(error.contains("no chats fit"), "{error}");
    }

    #[test]
    fn every_token_of_a_text_is_learned_once() {
        let text = text();
        let content = "One two three, four five six. ".repeat(9);
        let tokens = text.encode(&content, false).unwrap();
        for context in [2, 3, 16, 1000] {
            let data = Data::text(&content, &text, context).unwrap();
            assert!(data.documents.iter().all(|d| d.tokens().len() <= context && d.tokens().len() > 1));
            let learned: Vec<u32> = data.documents.iter().flat_map(|d| d.tokens()[1..].to_vec()).collect();
            assert_eq!(learned, tokens[1..]);
        }
        assert!(Data::text("", &text, 16).is_err());
    }
}
