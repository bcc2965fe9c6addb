//! The requests of the page: files, the model, and a conversation.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nf4::Arithmetic;
use nf4::checkpoint::{PeftAdapter, TensorFile};
use nf4_llama::{
    Cache, CacheType, Config, Conversation, Engine, Model, Options, Sampling, Shards, Text, TextFiles, Workspace,
    shard_names,
};
use rayon::ThreadPool;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::threads;

/// Tokens of a prompt that are computed at a time.
const BATCH: usize = 64;
/// The longest context that is taken.
const CONTEXT: usize = 4096;

/// What the page can ask for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Makes a pool of threads, of which the caller is the first.
    Threads { count: usize },
    /// A file begins, of which [`Chat::part`] brings the bytes.
    File { name: String, len: usize },
    /// The names of the files that an index of a model lists.
    Shards { index: String },
    /// Loads the model of the files.
    Load(Load),
    /// Loads the adapter of the files.
    Adapter { name: String },
    /// Changes the adapter of the conversation, or to none.
    Switch { name: Option<String> },
    /// Begins a new conversation.
    Restart {},
    /// Reads a message.
    Ask { message: String },
    /// Computes a token of the answer.
    Step { max_tokens: usize },
}

/// How a model is loaded, and how its tokens are chosen.
#[derive(Debug, Deserialize)]
pub(crate) struct Load {
    arithmetic: String,
    quantize_head: bool,
    f16_cache: bool,
    temperature: f32,
    top_p: f32,
    seed: u64,
}

/// Files that came, and the conversation with the model.
#[derive(Default)]
pub(crate) struct Chat {
    files: BTreeMap<String, File>,
    /// The file that is being read.
    current: String,
    talk: Option<(Engine, Conversation)>,
    /// The pool that `rayon` finds as the caller's own, because its first thread is the caller.
    pool: Option<ThreadPool>,
}

struct File {
    len: usize,
    bytes: Vec<u8>,
}

impl Chat {
    pub(crate) fn request(&mut self, request: Request) -> Result<Value> {
        match request {
            Request::Threads { count } => {
                self.pool = Some(threads::pool(count)?);
                Ok(Value::Null)
            }
            Request::File { name, len } => {
                let mut bytes = Vec::new();
                let no_memory = || anyhow!("{name}: no memory for {len} bytes in this page");
                bytes.try_reserve_exact(len).map_err(|_| no_memory())?;
                self.current.clone_from(&name);
                self.files.insert(name, File { len, bytes });
                Ok(Value::Null)
            }
            Request::Shards { index } => Ok(json!(shard_names(index.as_bytes())?)),
            Request::Load(load) => self.load(&load),
            Request::Adapter { name } => self.add_adapter(&name),
            Request::Switch { name } => {
                let (engine, conversation) = self.talk()?;
                let adapter = name.map(|name| engine.model.adapter(&name)).transpose()?;
                conversation.set_adapter(adapter);
                Ok(Value::Null)
            }
            Request::Restart {} => {
                self.talk()?.1.restart();
                Ok(Value::Null)
            }
            Request::Ask { message } => {
                let (engine, conversation) = self.talk()?;
                let prompt = conversation.ask(engine, &message)?;
                Ok(json!({ "tokens": prompt.tokens, "hash": format!("{:016x}", prompt.hash) }))
            }
            Request::Step { max_tokens } => {
                let (engine, conversation) = self.talk()?;
                let text = conversation.step(engine, max_tokens)?;
                Ok(json!({ "text": text, "decoded": conversation.decoded() }))
            }
        }
    }

    /// The next bytes of the file that is being read.
    pub(crate) fn part(&mut self, bytes: &[u8]) -> Result<Value> {
        let file = self.files.get_mut(&self.current).context("no file is being read")?;
        ensure!(bytes.len() <= file.len - file.bytes.len(), "{}: more bytes than it was to have", self.current);
        file.bytes.extend_from_slice(bytes);
        Ok(Value::Null)
    }

    fn talk(&mut self) -> Result<(&mut Engine, &mut Conversation)> {
        self.talk.as_mut().map(|(engine, conversation)| (engine, conversation)).context("no model is loaded")
    }

    /// Takes a file out.
    fn take(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.files.remove(name) else { return Ok(None) };
        let (got, len) = (file.bytes.len(), file.len);
        ensure!(got == len, "{name}: {got} bytes of {len}");
        Ok(Some(file.bytes))
    }

    fn needed(&mut self, name: &str) -> Result<Vec<u8>> {
        self.take(name)?.with_context(|| format!("there is no {name}"))
    }

    fn load(&mut self, load: &Load) -> Result<Value> {
        self.talk = None;
        let config = Config::parse(&self.needed("config.json")?)?;
        let end_tokens = config.end_tokens.clone();
        let text = self.text(&end_tokens)?;
        let names: Vec<String> = self.files.keys().filter(|name| name.ends_with(".safetensors")).cloned().collect();
        let mut shards = Shards::default();
        for name in names {
            let bytes = self.needed(&name)?;
            shards.add(Arc::new(bytes)).context(name)?;
        }
        let arithmetic = Arithmetic::ALL.into_iter().find(|a| a.name() == load.arithmetic);
        let arithmetic = arithmetic.with_context(|| format!("no arithmetic is called {}", load.arithmetic))?;
        let options = Options {
            arithmetic,
            quantize_head: load.quantize_head,
            threads: Some(Arc::new(nf4::Rayon)),
            ..Options::default()
        };
        let model = Model::load(config, &shards, options, |_, _| {})?;
        let cache_type = if load.f16_cache { CacheType::F16 } else { CacheType::F32 };
        let cache = Cache::new(model.config(), model.config().positions.min(CONTEXT), cache_type)?;
        let sampling = Sampling { temperature: load.temperature, top_k: 0, top_p: load.top_p, seed: load.seed };
        let workspace = Workspace::new(&model, BATCH, 1)?;
        let about = json!({
            "layers": model.config().layers,
            "bytes": model.data_bytes(),
            "kernels": model.kernels().isa().name(),
            // Each of them answers.
            "threads": rayon::broadcast(|_| ()).len(),
            "positions": cache.positions(),
            "chat": text.has_template(),
        });
        self.talk = Some((Engine { model, text, workspace }, Conversation::new(cache, sampling, None)));
        Ok(about)
    }

    fn text(&mut self, end_tokens: &[u32]) -> Result<Text> {
        let tokenizer = self.needed("tokenizer.json")?;
        let [config, template, generation] =
            ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"].map(|name| self.take(name));
        let (config, template, generation) = (config?, template?, generation?);
        let files = TextFiles {
            tokenizer: &tokenizer,
            config: config.as_deref(),
            template: template.as_deref(),
            generation: generation.as_deref(),
        };
        Text::new(files, end_tokens)
    }

    fn add_adapter(&mut self, name: &str) -> Result<Value> {
        let config = self.needed("adapter_config.json")?;
        let weights = self.needed("adapter_model.safetensors")?;
        let (engine, _) = self.talk()?;
        if name == "none" {
            bail!("an adapter cannot have the name none");
        }
        let file = TensorFile::parse(&weights).context("adapter_model.safetensors")?;
        let adapter = PeftAdapter::load(&config, &file).with_context(|| format!("adapter {name}"))?;
        engine.model.add_adapter(name, &adapter)?;
        // Buffers that are large enough for it.
        engine.workspace = Workspace::new(&engine.model, BATCH, 1)?;
        Ok(Value::Null)
    }
}
