//! The program on a tiny model: losses, stops and kills, bad input.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nf4_finetune_llm::History;
use tempfile::TempDir;

fn model() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../llama/tests/data/llama"))
}

/// The tiny model with a chat template, which the committed one has not.
fn chat_model(folder: &Path) -> PathBuf {
    let out = folder.join("model");
    fs::create_dir(&out).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model().join(name), out.join(name)).unwrap();
    }
    let template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    fs::write(out.join("chat_template.jinja"), template).unwrap();
    out
}

fn chats(count: usize) -> String {
    let chat = |i: usize| {
        let messages = [("user", format!("Say {i}")), ("assistant", format!("Aye, {i} it be!"))];
        let messages = messages.map(|(role, content)| serde_json::json!({ "role": role, "content": content }));
        format!("{}\n", serde_json::json!({ "messages": messages }))
    };
    (0..count).map(chat).collect()
}

fn program(model: &Path, data: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finetune-llm"));
    command.arg(model).arg(data).arg("--out").arg(out).args(more);
    command
}

fn run(model: &Path, data: &Path, out: &Path, more: &[&str]) -> Output {
    program(model, data, out, more).output().unwrap()
}

fn losses(out: &Path) -> History {
    serde_json::from_slice(&fs::read(out.join("losses.json")).unwrap()).unwrap()
}

#[track_caller]
fn fine(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[track_caller]
fn failed(output: &Output, expected: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !text.contains("panicked"), "{text}");
    for part in expected {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

struct Setting {
    folder: TempDir,
    model: PathBuf,
    data: PathBuf,
}

impl Setting {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, data) = (chat_model(folder.path()), folder.path().join("chats.jsonl"));
        fs::write(&data, chats(40)).unwrap();
        Self { folder, model, data }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, out: &str, more: &[&str]) -> Output {
        run(&self.model, &self.data, &self.out(out), &[&SHORT[..], more].concat())
    }
}

/// A short run.
const SHORT: [&str; 12] = [
    "--steps",
    "12",
    "--context",
    "64",
    "--accumulate",
    "2",
    "--learning-rate",
    "1e-2",
    "--evaluate-every",
    "6",
    "--warmup",
    "2",
];

#[test]
fn losses_go_down_on_chats_and_on_a_text() {
    let setting = Setting::new();
    let text = setting.out("text.txt");
    fs::write(&text, "The quick brown fox jumps over the lazy dog. ".repeat(60)).unwrap();
    for (data, model, name) in [(&setting.data, &setting.model, "chats"), (&text, &model(), "text")] {
        let out = setting.out(name);
        let more = ["--steps", "40", "--context", "64", "--accumulate", "2", "--learning-rate", "2e-2"];
        let said = fine(&run(model, data, &out, &more));
        assert!(said.contains("tokens/s") && said.contains("left"), "{said}");
        let history = losses(&out);
        assert_eq!(history.training.len(), 40);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&history.training[..5]), mean(&history.training[35..]));
        assert!(last < 0.7 * first, "{name}: {first} {last}");
        let evaluation = &history.evaluation;
        assert!(evaluation.len() == 11 && evaluation[10].1 < 0.8 * evaluation[0].1, "{name}: {evaluation:?}");
        assert!(fs::read_to_string(out.join("losses.svg")).unwrap().starts_with("<svg"));

        // What PEFT is to load, merged and talked with: the library reads it back, for the model's modules.
        let adapter = nf4_candle::load_peft(out.join("adapter-000040")).unwrap();
        assert_eq!((adapter.modules().count(), adapter.config().rank("model.layers.0.mlp.up_proj")), (14, 8));
        assert!(adapter.modules().all(|(_, module)| module.adapter().b().data().iter().any(|b| *b != 0.0)));
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_as_if_it_had_not() {
    let setting = Setting::new();
    fine(&setting.run("whole", &[]));
    let whole = losses(&setting.out("whole"));
    fine(&setting.run("parts", &["--stop-after", "5"]));
    for _ in 0..2 {
        fine(&setting.run("parts", &["--stop-after", "3", "--resume"]));
    }
    assert_eq!(losses(&setting.out("parts")).training.len(), 11);
    fine(&setting.run("parts", &["--resume"]));
    assert_eq!(losses(&setting.out("parts")), whole);
    let file = |out: &str| fs::read(setting.out(out).join("adapter-000012/adapter_model.safetensors")).unwrap();
    assert_eq!(file("parts"), file("whole"));

    // Threads change nothing, and a run that is complete stays so.
    let mut alone = program(&setting.model, &setting.data, &setting.out("one"), &SHORT);
    fine(&alone.env("RAYON_NUM_THREADS", "1").output().unwrap());
    assert_eq!(losses(&setting.out("one")), whole);
    fine(&setting.run("parts", &["--resume"]));
    assert_eq!(losses(&setting.out("parts")), whole);

    // Nothing is overwritten unasked, and no run goes on with other settings or data.
    failed(&setting.run("whole", &[]), &["there is a run already", "--resume"]);
    failed(&setting.run("whole", &["--resume", "--seed", "1"]), &["seed = 0", "now it is 1"]);
    failed(&setting.run("whole", &["--resume", "--rank", "4", "--alpha", "16"]), &["rank = 8", "now it is 4"]);
    fs::write(&setting.data, chats(41)).unwrap();
    failed(&setting.run("whole", &["--resume"]), &["data = "]);
    failed(&setting.run("never", &["--resume"]), &["checkpoint.safetensors"]);
    assert_eq!(losses(&setting.out("whole")), whole);
}

/// With `DoRA`: losses go down, a stop changes nothing, and the adapters are those of PEFT.
#[test]
fn dora_is_trained_stopped_and_saved() {
    let setting = Setting::new();
    let said = fine(&setting.run("whole", &["--dora"]));
    let whole = losses(&setting.out("whole"));
    assert!(whole.evaluation[2].1 < whole.evaluation[0].1, "{said}");
    fine(&setting.run("parts", &["--dora", "--stop-after", "5"]));
    failed(&setting.run("parts", &["--resume"]), &["dora = true", "now it is false"]);
    fine(&setting.run("parts", &["--dora", "--resume"]));
    assert_eq!(losses(&setting.out("parts")), whole);

    // A fresh adapter is the model, with or without magnitudes.
    fine(&setting.run("lora", &[]));
    let lora = losses(&setting.out("lora"));
    assert_eq!((lora.training[0], lora.evaluation[0]), (whole.training[0], whole.evaluation[0]));
    assert_ne!(lora.training[11], whole.training[11]);

    let [first, last] = ["adapter-000000", "adapter-000012"]
        .map(|name| nf4_candle::load_peft(setting.out("whole").join(name)).unwrap());
    assert!(last.config().is_dora() && last.modules().count() == 14);
    for (name, module) in last.modules() {
        let [first, last] = [first.module(name).unwrap(), module].map(|m| m.adapter().magnitude().unwrap().data());
        assert!(first.iter().zip(last).all(|(first, last)| first != last), "{name}");
    }

    // A run that starts from it trains the magnitudes too.
    let adapter = setting.out("whole/adapter-000012").display().to_string();
    fine(&setting.run("more", &["--adapter", &adapter]));
    assert_eq!(losses(&setting.out("more")).evaluation[0].1, whole.evaluation[2].1);
    assert!(nf4_candle::load_peft(setting.out("more/adapter-000012")).unwrap().config().is_dora());
    failed(&setting.run("both", &["--adapter", &adapter, "--dora"]), &["--dora", "--adapter"]);
}

/// Killed at many moments, most of them in the middle of saving, because every step saves.
#[test]
fn a_run_that_is_killed_loses_no_checkpoint() {
    let setting = Setting::new();
    fine(&setting.run("whole", &[]));
    let whole = losses(&setting.out("whole"));
    let (mut kills, mut rounds) = (0, 0);
    let out = setting.out("killed");
    loop {
        rounds += 1;
        assert!(rounds < 200, "the run does not end");
        // Once there is a checkpoint there always is a whole one.
        let resume: &[&str] = if out.join("checkpoint.safetensors").exists() { &["--resume"] } else { &[] };
        let more = [&SHORT[..], &["--save-every", "1"], resume].concat();
        let mut child =
            program(&setting.model, &setting.data, &out, &more).stderr(std::process::Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40 + 23 * rounds));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            break;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code().is_none(), "it ended by itself: {said}");
    }
    assert!(kills > 0, "it was too fast to be killed");
    assert_eq!(losses(&out), whole);
}

/// What a kill in the middle of writing leaves.
#[test]
fn half_written_files_are_not_read() {
    let setting = Setting::new();
    fine(&setting.run("whole", &[]));
    fine(&setting.run("parts", &["--stop-after", "6"]));
    let out = setting.out("parts");
    let bytes = fs::read(out.join("checkpoint.safetensors")).unwrap();
    fs::write(out.join("checkpoint.safetensors.partial"), &bytes[..bytes.len() / 2]).unwrap();
    fs::create_dir(out.join("adapter.partial")).unwrap();
    fs::write(out.join("adapter.partial/adapter_model.safetensors"), "half").unwrap();
    fine(&setting.run("parts", &["--resume"]));
    assert_eq!(losses(&out), losses(&setting.out("whole")));

    // A file that is not whole is an error, not another run.
    fs::write(out.join("checkpoint.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    failed(&setting.run("parts", &["--resume"]), &["checkpoint.safetensors"]);
}

#[test]
fn bad_data_is_named() {
    let setting = Setting::new();
    let with = |content: &str, more: &[&str]| {
        fs::write(&setting.data, content).unwrap();
        let output = setting.run("out", more);
        assert!(!setting.out("out").exists(), "a run was started");
        output
    };
    failed(&with("", &[]), &["chats.jsonl", "nothing to learn"]);
    failed(&with(&format!("{}{{\n", chats(3)), &[]), &["chats.jsonl", "line 4", "not JSON"]);
    failed(&with(&format!("{}{{\"text\": 1}}\n", chats(3)), &[]), &["line 4", "messages"]);
    failed(&with(&chats(1), &[]), &["one document", "--evaluation"]);
    failed(&with(&chats(9), &["--context", "257"]), &["--context 257", "256 positions"]);
    failed(&with(&chats(9), &["--context", "1"]), &["--context 1"]);
    failed(&with(&chats(9), &["--context", "5"]), &["no chats fit", "line 1: ", "context of 5"]);
    failed(&with(&chats(9), &["--targets", "q_proj,nothing"]), &["nothing"]);
    failed(&with(&chats(9), &["--learning-rate", "-1"]), &["--learning-rate"]);
    failed(&with(&chats(9), &["--steps", "0"]), &["no steps"]);

    fs::remove_file(&setting.data).unwrap();
    failed(&setting.run("out", &[]), &["chats.jsonl"]);
    let text = setting.out("empty.txt");
    fs::write(&text, "").unwrap();
    failed(&run(&setting.model, &text, &setting.out("out"), &[]), &["empty.txt", "nothing to learn"]);

    // Cut with a warning that has line and numbers.
    let long = chats(1).replace("it be!", &"very long ".repeat(40));
    fs::write(&setting.data, format!("{}{long}{}", chats(20), chats(20))).unwrap();
    let said = fine(&setting.run("cut", &[]));
    assert!(
        said.contains("warning: ") && said.contains("line 21: ") && said.contains("the context of 64: cut"),
        "{said}"
    );
}

/// A learning rate that no training survives: the loss becomes NaN or infinite, and what was saved before stays.
#[test]
fn a_loss_that_is_not_finite_ends_the_run() {
    let setting = Setting::new();
    let more = ["--learning-rate", "1e30", "--clip", "1e30", "--save-every", "1", "--evaluate-every", "100"];
    let output = setting.run("out", &more);
    failed(&output, &["step "]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(["NaN", "inf", "not finite"].iter().any(|word| said.contains(word)), "{said}");
    assert!(said.contains("as it was saved last"), "{said}");
    let history = losses(&setting.out("out"));
    assert!(!history.training.is_empty() && history.training.iter().all(|loss| loss.is_finite()), "{history:?}");
}
