//! The run: data, model, steps, evaluations, and what is saved.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_nn::VarMap;
use nf4::checkpoint::{FloatType, PeftAdapter, TensorSource};
use nf4::{Arithmetic, LoRAScaling};
use nf4_candle::{load_peft, peft_adapter, save_peft};
use nf4_llama::program::awake;
use nf4_llama::{Directory, Text, TextFiles};
use serde_json::json;

use crate::arguments::{Arguments, ArithmeticName};
use crate::checkpoint::{Checkpoint, FILE, History, replace};
use crate::data::{Data, Document};
use crate::model::{Adapters, LINEARS, Llama};
use crate::optimizer::{Optimizer, Schedule};
use crate::pack::{Sequence, Stream};
use crate::plot;
use crate::progress::Progress;
use crate::settings::Settings;

/// Runs the program.
///
/// # Errors
/// Whatever went wrong, with the file, line or number. What was saved before stays.
pub fn run(arguments: &Arguments) -> Result<()> {
    Run::new(arguments)?.run()
}

/// A run on its way.
struct Run<'a> {
    arguments: &'a Arguments,
    settings: Settings,
    training: Vec<Document>,
    evaluation: Vec<Sequence>,
    directory: Directory,
    start: Option<PeftAdapter>,
}

impl<'a> Run<'a> {
    fn new(arguments: &'a Arguments) -> Result<Self> {
        let directory = Directory::open(&arguments.model)?;
        let config = directory.config()?;
        let text = text_of(&directory, &config.end_tokens)?;
        let positions = config.positions;
        let context = arguments.context.unwrap_or(positions.min(512));
        ensure!(context >= 2, "--context {context}: a sequence needs two tokens, one to predict the other");
        ensure!(context <= positions, "--context {context} is more than the {positions} positions of the model");

        let (training, evaluation) = read_data(arguments, &text, context)?;
        let stream = Stream::new(&training, context, arguments.seed, !arguments.no_shuffle);
        let steps = steps(arguments, stream.per_epoch())?;
        let rank = usize::from(arguments.rank);
        let start = arguments.adapter.as_deref().map(load_peft).transpose()?;
        let targets = if start.is_some() { Vec::new() } else { arguments.targets.clone() };
        if let Some(other) = targets.iter().find(|target| !LINEARS.contains(&target.as_str())) {
            bail!("--targets {other}: the linear layers are {}", LINEARS.join(", "));
        }
        for (name, value) in [
            ("learning-rate", arguments.learning_rate),
            ("weight-decay", arguments.weight_decay),
            ("clip", arguments.clip),
            ("alpha", arguments.alpha.unwrap_or(0.0)),
        ] {
            ensure!(value.is_finite() && value >= 0.0, "--{name} {value} is not a number from 0");
        }
        let settings = Settings {
            data: hash(
                training
                    .iter()
                    .flat_map(|d| [d.tokens(), &d.learned().iter().map(|l| u32::from(*l)).collect::<Vec<_>>()].concat())
                    .chain(evaluation.iter().flat_map(|sequence| sequence.tokens().to_vec())),
            ),
            model: model_hash(&directory),
            targets,
            rank,
            alpha: arguments.alpha.unwrap_or(2.0 * rank as f64),
            rslora: arguments.rslora,
            dora: arguments.dora,
            steps,
            context,
            accumulate: usize::from(arguments.accumulate),
            learning_rate: arguments.learning_rate,
            warmup: arguments.warmup.unwrap_or(steps / 20),
            weight_decay: arguments.weight_decay,
            clip: arguments.clip,
            evaluate_every: arguments.evaluate_every.unwrap_or(steps / 10).max(1),
            arithmetic: if arguments.arithmetic == ArithmeticName::F32 { "f32" } else { "16x4" }.to_string(),
            seed: arguments.seed,
            shuffle: !arguments.no_shuffle,
        };
        Ok(Self { arguments, settings, training, evaluation, directory, start })
    }

    fn run(self) -> Result<()> {
        let (settings, out) = (&self.settings, self.arguments.out.as_path());
        let mut stream = Stream::new(&self.training, settings.context, settings.seed, settings.shuffle);
        if let Some(file) = &self.arguments.write_batches {
            return write_batches(file, settings, &mut stream);
        }
        let before = self.before(out)?;
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;

        let vars = VarMap::new();
        let adapters = Adapters {
            targets: &settings.targets,
            rank: settings.rank,
            alpha: settings.alpha,
            scaling: if settings.rslora { LoRAScaling::RsLoRA } else { LoRAScaling::Standard },
            dora: settings.dora,
            seed: settings.seed,
            start: self.start.as_ref(),
        };
        let arithmetic = if settings.arithmetic == "f32" { Arithmetic::F32 } else { Arithmetic::SixteenByFour };
        let model = Llama::load(self.directory.config()?, &self.directory, arithmetic, &adapters, &vars)
            .with_context(|| self.arguments.model.display().to_string())?;
        let mut optimizer = Optimizer::new(&vars, settings.weight_decay)?;
        let mut history = History::default();
        if let Some(checkpoint) = before {
            optimizer.set_state(checkpoint.state).with_context(|| out.join(FILE).display().to_string())?;
            history = checkpoint.history;
        }
        let parameters: usize = vars.all_vars().iter().map(|var| var.elem_count()).sum();
        eprintln!(
            "{} documents in {} sequences, {} for evaluation; {parameters} parameters are trained in {} steps",
            self.training.len(),
            stream.per_epoch(),
            self.evaluation.len(),
            settings.steps,
        );
        stream.skip(history.training.len() * settings.accumulate);
        Training { run: &self, out, model, optimizer, history, stream }.go_on()
    }

    /// The checkpoint that the run goes on from.
    fn before(&self, out: &Path) -> Result<Option<Checkpoint>> {
        let file = out.join(FILE);
        if !self.arguments.resume {
            ensure!(!file.exists(), "{}: there is a run already; --resume goes on with it", file.display());
            return Ok(None);
        }
        let checkpoint = Checkpoint::load(out)?;
        checkpoint.settings.check(&self.settings).with_context(|| file.display().to_string())?;
        Ok(Some(checkpoint))
    }
}

/// What changes from step to step.
struct Training<'a> {
    run: &'a Run<'a>,
    out: &'a Path,
    model: Llama,
    optimizer: Optimizer,
    history: History,
    stream: Stream<'a>,
}

impl Training<'_> {
    fn go_on(mut self) -> Result<()> {
        let Settings { steps, evaluate_every, learning_rate: peak, warmup, .. } = self.run.settings;
        let schedule = Schedule { peak, warmup, steps };
        let first = self.history.training.len();
        let mut progress = Progress::new(first, steps)?;
        if self.history.evaluation.is_empty() {
            progress.aside(|| {
                awake(|| self.evaluate(0))?;
                self.save_adapter(0)
            })?;
            self.say_evaluation(&progress);
        }
        let last = self.run.arguments.stop_after.map_or(steps, |count| steps.min(first + count));
        for step in first..last {
            let sequences = self.stream.take(self.run.settings.accumulate);
            let rate = schedule.rate(step);
            let loss = awake(|| self.step(step, &sequences, rate))?;
            self.history.training.push(loss);
            let (done, tokens) = (step + 1, sequences.iter().map(|s| s.tokens().len()).sum());
            progress.step(done, tokens, loss, rate);
            let evaluates = done.is_multiple_of(evaluate_every) || done == steps;
            if evaluates {
                progress.aside(|| {
                    awake(|| self.evaluate(done))?;
                    self.save_adapter(done)
                })?;
                self.say_evaluation(&progress);
            }
            let saves = self.run.arguments.save_every.is_some_and(|every| done.is_multiple_of(every as usize));
            if evaluates || saves || done == last {
                progress.aside(|| self.save())?;
            }
        }
        if last == steps {
            progress.say(&format!("adapter: {}", self.adapter_directory(steps).display()));
        } else {
            progress.say(&format!("stopped after step {last} of {steps}; --resume goes on"));
        }
        Ok(())
    }

    /// A step of the optimizer on some sequences; returns the mean loss of their targets.
    fn step(&mut self, step: usize, sequences: &[Sequence], rate: f64) -> Result<f64> {
        let all: usize = sequences.iter().map(|sequence| sequence.targets().0.len()).sum();
        let mut sum = 0.0;
        for sequence in sequences {
            let (loss, _) = self.model.loss(sequence, true)?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            if !value.is_finite() {
                bail!("step {}: the loss is {value}, on {}{}", step + 1, lines(sequence), self.saved());
            }
            sum += value;
            self.optimizer.accumulate(&(loss / all as f64)?.backward()?)?;
        }
        let norm = self.optimizer.clip(self.run.settings.clip);
        if !norm.is_finite() {
            let lines: Vec<String> = sequences.iter().map(lines).collect();
            bail!("step {}: the norm of the gradients is {norm}, on {}{}", step + 1, lines.join(", "), self.saved());
        }
        self.optimizer.step(rate).with_context(|| format!("step {}{}", step + 1, self.saved()))?;
        Ok(sum / all as f64)
    }

    /// What a message says of what is left when a run ends early.
    fn saved(&self) -> String {
        let file = self.out.join(FILE);
        if file.exists() { format!("; {} is as it was saved last", file.display()) } else { String::new() }
    }

    fn evaluate(&mut self, done: usize) -> Result<()> {
        let (mut sum, mut all) = (0.0, 0);
        for sequence in &self.run.evaluation {
            let (loss, count) = self.model.loss(sequence, false)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            all += count;
        }
        let loss = sum / all as f64;
        ensure!(loss.is_finite(), "after step {done}: the loss of the evaluation is {loss}{}", self.saved());
        self.history.evaluation.push((done, loss));
        Ok(())
    }

    fn say_evaluation(&self, progress: &Progress) {
        if let Some((done, loss)) = self.history.evaluation.last() {
            progress.say(&format!("evaluation after step {done}: loss {loss:.4}"));
        }
    }

    fn adapter_directory(&self, done: usize) -> PathBuf {
        self.out.join(format!("adapter-{done:06}"))
    }

    /// An adapter of PEFT in a directory of its own, which appears as a whole.
    fn save_adapter(&self, done: usize) -> Result<()> {
        let name = self.run.arguments.model.display().to_string();
        let adapter = peft_adapter(self.model.trained())?;
        let adapter =
            adapter.with_field("base_model_name_or_path", json!(name)).with_field("task_type", json!("CAUSAL_LM"));
        let (directory, partial) = (self.adapter_directory(done), self.out.join("adapter.partial"));
        if directory.exists() {
            // A run that was killed before its checkpoint makes the same adapter again.
            return Ok(());
        }
        if partial.exists() {
            fs::remove_dir_all(&partial).with_context(|| partial.display().to_string())?;
        }
        save_peft(&adapter, &partial, FloatType::F32)?;
        fs::rename(&partial, &directory).with_context(|| directory.display().to_string())
    }

    fn save(&self) -> Result<()> {
        let (settings, history) = (self.run.settings.clone(), self.history.clone());
        Checkpoint { settings, history, state: self.optimizer.state() }.save(self.out)?;
        replace(&self.out.join("losses.svg"), plot::svg(&self.history)?.as_bytes())?;
        replace(&self.out.join("losses.json"), &serde_json::to_vec_pretty(&self.history)?)
    }
}

/// The lines that a sequence came from, for a message.
fn lines(sequence: &Sequence) -> String {
    let numbers: Vec<String> = sequence.lines().iter().map(ToString::to_string).collect();
    format!("line{} {}", if numbers.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

/// What is trained on, and what is evaluated.
fn read_data(arguments: &Arguments, text: &Text, context: usize) -> Result<(Vec<Document>, Vec<Sequence>)> {
    let read = |path: &Path| -> Result<Vec<Document>> {
        let data = Data::read(path, text, context)?;
        data.warnings.iter().for_each(|warning| eprintln!("warning: {}: {warning}", path.display()));
        Ok(data.documents)
    };
    let mut training = read(&arguments.data)?;
    let evaluation = match &arguments.evaluation {
        Some(path) => read(path)?,
        None => {
            let part = arguments.held_out;
            ensure!((0.0..1.0).contains(&part) && part > 0.0, "--held-out {part} is not between 0 and 1");
            let all = training.len();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a count")]
            let kept = ((all as f64 * part).ceil() as usize).min(all - 1);
            ensure!(
                kept > 0,
                "{}: one document cannot be trained on and evaluated; --evaluation names another file",
                arguments.data.display()
            );
            // The last ones of a text. Of chats, whose order may mean something, some at equal distances.
            let is_text = training[0].line() == training[all - 1].line();
            if is_text {
                training.split_off(all - kept)
            } else {
                let mut places = 0..;
                let every = all / kept;
                let held = |_: &mut Document| places.next().is_some_and(|place: usize| place % every == every - 1);
                training.extract_if(.., held).collect()
            }
        }
    };
    Ok((training, Stream::once(&evaluation, context)))
}

fn steps(arguments: &Arguments, per_epoch: usize) -> Result<usize> {
    let steps = arguments.steps.unwrap_or_else(|| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let steps = (arguments.epochs * per_epoch as f64 / f64::from(arguments.accumulate)).ceil() as usize;
        steps
    });
    ensure!(steps > 0, "no steps: --epochs {} or --steps {:?}", arguments.epochs, arguments.steps);
    Ok(steps)
}

fn text_of(directory: &Directory, end_tokens: &[u32]) -> Result<Text> {
    let tokenizer = directory.read("tokenizer.json")?.context("the model has no tokenizer.json")?;
    let (config, template) = (directory.read("tokenizer_config.json")?, directory.read("chat_template.jinja")?);
    let files =
        TextFiles { tokenizer: &tokenizer, config: config.as_deref(), template: template.as_deref(), generation: None };
    Text::new(files, end_tokens)
}

/// The FNV-1a hash of words.
fn hash(words: impl IntoIterator<Item = u32>) -> String {
    let bytes = words.into_iter().flat_map(u32::to_le_bytes);
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn model_hash(directory: &Directory) -> String {
    let mut names: Vec<&str> = directory.names().collect();
    names.sort_unstable();
    let text: String = names
        .iter()
        .filter_map(|name| directory.info(name).map(|info| format!("{name} {} {:?}\n", info.dtype, info.shape)))
        .collect();
    hash(text.bytes().map(u32::from))
}

fn write_batches(file: &Path, settings: &Settings, stream: &mut Stream<'_>) -> Result<()> {
    let mut text = String::new();
    for step in 0..settings.steps {
        for sequence in stream.take(settings.accumulate) {
            let (places, targets) = sequence.targets();
            let documents: Vec<[usize; 2]> = sequence.documents().map(|range| [range.start, range.end]).collect();
            let line = json!({
                "step": step, "tokens": sequence.tokens(), "documents": documents, "lines": sequence.lines(),
                "places": places, "targets": targets,
            });
            text.push_str(&format!("{line}\n"));
        }
    }
    fs::write(file, text).with_context(|| file.display().to_string())
}
