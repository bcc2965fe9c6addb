//! A model with its adapters and texts, as the arguments say.

use alloc::string::ToString;
use alloc::sync::Arc;
use std::eprintln;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use super::awake::Awake;
use super::{Arguments, Head};
use crate::cache::Cache;
use crate::conversation::{Conversation, Engine};
use crate::directory::{Directory, read_adapter};
use crate::model::{AdapterId, Model, Options};
use crate::text::{Text, TextFiles};
use crate::workspace::Workspace;

/// The longest context that is taken without being asked for.
const CONTEXT: usize = 4096;

pub(super) struct Loaded {
    pub(super) engine: Engine,
    pub(super) context: usize,
}

impl Loaded {
    pub(super) fn new(arguments: &Arguments) -> Result<Self> {
        let start = Instant::now();
        let directory = Directory::open(&arguments.model)?;
        let config = directory.config()?;
        let options = Options {
            arithmetic: arguments.arithmetic(),
            quantize_head: arguments.head == Head::Nf4,
            threads: Some(Arc::new(Awake)),
            ..Options::default()
        };
        let quantizes = config.quantization.is_none();
        let bar = if quantizes { ProgressBar::new(1) } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("quantizing {bar:40} {pos}/{len}")?);
        let mut model = Model::load(config, &directory, options, |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })
        .with_context(|| arguments.model.display().to_string())?;
        bar.finish_and_clear();
        for (name, path) in &arguments.adapters {
            let adapter = read_adapter(path)?;
            model.add_adapter(name, &adapter).with_context(|| path.display().to_string())?;
        }
        let text = text_of(&directory, &model.config().end_tokens)?;
        let context = arguments.context.unwrap_or(model.config().positions.min(CONTEXT));
        let workspace = Workspace::new(&model, usize::from(arguments.batch_size), 1)?;
        eprintln!(
            "{}: {} layers, {:.1} MB, kernels {}, loaded in {:.2} s",
            arguments.model.display(),
            model.config().layers,
            model.data_bytes() as f64 / 1e6,
            model.kernels().isa(),
            start.elapsed().as_secs_f64(),
        );
        Ok(Self { engine: Engine { model, text, workspace }, context })
    }

    /// The adapter of a name, where `none` is none.
    pub(super) fn adapter(&self, name: &str) -> Result<Option<AdapterId>> {
        if name == "none" { Ok(None) } else { Ok(Some(self.engine.model.adapter(name)?)) }
    }

    /// A conversation with the adapter of this name.
    pub(super) fn conversation(&self, arguments: &Arguments, adapter: Option<&str>) -> Result<Conversation> {
        let cache = self.cache(arguments)?;
        let mut conversation = Conversation::new(cache, arguments.sampling(), arguments.system.clone());
        conversation.set_adapter(self.adapter(adapter.unwrap_or("none"))?);
        Ok(conversation)
    }

    pub(super) fn cache(&self, arguments: &Arguments) -> Result<Cache> {
        Ok(Cache::new(self.engine.model.config(), self.context, arguments.cache_type())?)
    }
}

/// Tokenizer and template.
fn text_of(directory: &Directory, end_tokens: &[u32]) -> Result<Text> {
    let tokenizer = directory.read("tokenizer.json")?.context("the model has no tokenizer.json")?;
    let (config, template) = (directory.read("tokenizer_config.json")?, directory.read("chat_template.jinja")?);
    let generation = directory.read("generation_config.json")?;
    let files = TextFiles {
        tokenizer: &tokenizer,
        config: config.as_deref(),
        template: template.as_deref(),
        generation: generation.as_deref(),
    };
    Text::new(files, end_tokens)
}
