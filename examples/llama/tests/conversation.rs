//! Conversations with the tiny Llama: the committed hashes and texts, which the page of `examples/web` must give too.

#![allow(clippy::unwrap_used, clippy::std_instead_of_alloc, reason = "tests end at the first surprise, and have std")]

use std::fs;
use std::path::Path;

use nf4::Arithmetic;
use nf4_llama::{
    Cache, CacheType, Conversation, Directory, Engine, Model, Options, Sampling, Text, TextFiles, Workspace,
    read_adapter,
};
use serde_json::{Value, json};

const QUESTIONS: [&str; 2] = ["Why is the sky blue?", "And at night?"];
const MAX_TOKENS: usize = 16;
/// The likeliest tokens of random weights would all be the same.
const SAMPLING: Sampling = Sampling { temperature: 1.5, top_k: 0, top_p: 0.9, seed: 7 };

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama"))
}

fn engine(arithmetic: Arithmetic) -> Engine {
    let directory = Directory::open(folder()).unwrap();
    let config = directory.config().unwrap();
    let [tokenizer, texts] = ["tokenizer.json", "tokenizer_config.json"].map(|name| directory.read(name).unwrap());
    let files = TextFiles { tokenizer: &tokenizer.unwrap(), config: texts.as_deref(), ..TextFiles::default() };
    let text = Text::new(files, &config.end_tokens).unwrap();
    let mut model = Model::load(config, &directory, Options { arithmetic, ..Options::default() }, |_, _| {}).unwrap();
    for name in ["one", "two"] {
        let adapter = read_adapter(&folder().join(format!("adapter_{name}"))).unwrap();
        model.add_adapter(&format!("adapter_{name}"), &adapter).unwrap();
    }
    let workspace = Workspace::new(&model, 32, 1).unwrap();
    Engine { model, text, workspace }
}

fn conversation(engine: &Engine) -> Conversation {
    Conversation::new(Cache::new(engine.model.config(), 256, CacheType::F32).unwrap(), SAMPLING, None)
}

fn answer(engine: &mut Engine, conversation: &mut Conversation) -> String {
    let mut text = String::new();
    while let Some(piece) = conversation.step(engine, MAX_TOKENS).unwrap() {
        text += &piece;
    }
    text
}

/// The hash of the first logits and the text of each answer. The second question comes after the first answer, so its
/// hash follows from all tokens before.
fn talk(engine: &mut Engine, conversation: &mut Conversation) -> Value {
    conversation.restart();
    let answers = QUESTIONS.map(|question| {
        let prompt = conversation.ask(engine, question).unwrap();
        json!({ "hash": format!("{:016x}", prompt.hash), "text": answer(engine, conversation) })
    });
    json!(answers)
}

#[test]
fn conversations_are_the_committed_ones() {
    let mut got = json!({ "questions": QUESTIONS, "max_tokens": MAX_TOKENS });
    let Sampling { temperature, top_p, seed, .. } = SAMPLING;
    got["sampling"] = json!({ "temperature": temperature, "top_p": f64::from(top_p * 10.0) / 10.0, "seed": seed });
    for arithmetic in Arithmetic::ALL {
        let mut engine = engine(arithmetic);
        let mut conversation = conversation(&engine);
        // And back.
        for name in ["none", "adapter_one", "adapter_two", "none"] {
            conversation.set_adapter(engine.model.adapter(name).ok());
            let answers = talk(&mut engine, &mut conversation);
            let place = &mut got["answers"][arithmetic.name()][name];
            assert!(place.is_null() || *place == answers, "{name}: {answers}");
            *place = answers;
        }
    }
    let file = folder().join("conversations.json");
    let text = serde_json::to_string_pretty(&got).unwrap() + "\n";
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(text == committed, "{} should be:\n{text}", file.display());
}

#[test]
fn too_much_is_an_error_and_forgotten() {
    let mut engine = engine(Arithmetic::default());
    let mut conversation = conversation(&engine);
    let expected = talk(&mut engine, &mut conversation);
    conversation.restart();
    let error = conversation.ask(&mut engine, &"long ".repeat(60)).unwrap_err();
    assert!(error.to_string().contains("positions of the cache"), "{error}");
    assert_eq!(conversation.step(&mut engine, MAX_TOKENS).unwrap(), None);
    assert_eq!(talk(&mut engine, &mut conversation), expected);
}

/// An answer that the user stops is part of the conversation, as far as it came.
#[test]
fn answers_can_be_stopped() {
    let mut engine = engine(Arithmetic::default());
    let [mut stopped, mut whole] = [0; 2].map(|_| conversation(&engine));
    whole.ask(&mut engine, QUESTIONS[0]).unwrap();
    while whole.step(&mut engine, 3).unwrap().is_some() {}
    stopped.ask(&mut engine, QUESTIONS[0]).unwrap();
    for _ in 0..3 {
        stopped.step(&mut engine, MAX_TOKENS).unwrap().unwrap();
    }
    let after = [&mut stopped, &mut whole].map(|c| c.ask(&mut engine, QUESTIONS[1]).unwrap().hash);
    assert_eq!(after[0], after[1]);
}

/// What a conversation says does not depend on what the cache had before.
#[test]
fn adapters_change_in_the_middle() {
    let mut engine = engine(Arithmetic::default());
    let adapter = engine.model.adapter("adapter_one").ok();
    let mut conversation = conversation(&engine);
    conversation.ask(&mut engine, QUESTIONS[0]).unwrap();
    let first = answer(&mut engine, &mut conversation);
    conversation.set_adapter(adapter);
    let switched = conversation.ask(&mut engine, QUESTIONS[1]).unwrap();
    let mut cache = Cache::new(engine.model.config(), 256, CacheType::F32).unwrap();
    let chat = [("user", QUESTIONS[0]), ("assistant", &first), ("user", QUESTIONS[1])]
        .map(|(role, content)| nf4_llama::Message { role, content: content.to_owned() });
    let tokens = engine.text.prompt(&chat).unwrap();
    let logits = engine.model.extend(&mut cache, &tokens, adapter, &mut engine.workspace).unwrap();
    // The answer's text may not be what its tokens decode to again, so it is read as text here too.
    assert_eq!(switched.tokens, tokens.len());
    assert_eq!(switched.hash, nf4_llama::hash(logits));
}
