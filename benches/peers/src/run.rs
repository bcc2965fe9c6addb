//! A run: what was measured, on what, and how it was called.

use std::{env, fs};

use serde::{Deserialize, Serialize};

use crate::measure::Record;

/// A run, as `--json` writes it and `plot.py` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Run {
    pub cpu: String,
    /// Vector instructions that the peers were compiled for.
    pub built_for: String,
    /// The compiler and the interpreter.
    pub tools: Vec<String>,
    pub command: String,
    pub rows: usize,
    pub cols: usize,
    pub rounds: usize,
    pub records: Vec<Record>,
    pub missing: Vec<Missing>,
}

/// A peer that is not in the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Missing {
    pub name: String,
    pub why: String,
}

impl Run {
    pub fn new([rows, cols, rounds]: [usize; 3]) -> Self {
        let built_for = if cfg!(target_feature = "avx512f") {
            "AVX-512"
        } else if cfg!(target_feature = "avx2") {
            "AVX2"
        } else {
            "the baseline of the architecture"
        };
        let (built_for, tools) = (built_for.into(), vec![env!("RUSTC_VERSION").into()]);
        Self { cpu: cpu(), built_for, tools, command: command(), rows, cols, rounds, ..Self::default() }
    }

    /// Adds what another process measured.
    pub fn add(&mut self, other: Self) {
        self.records.extend(other.records);
        self.tools.extend(other.tools.into_iter().filter(|t| !t.starts_with("rustc")));
        self.missing.extend(other.missing);
        self.missing.sort_by(|a, b| a.name.cmp(&b.name));
        self.missing.dedup();
        self.tools.dedup();
    }
}

/// The version of a package in `Cargo.lock`.
pub fn locked_version(package: &str) -> String {
    let lock = include_str!("../Cargo.lock");
    let after = lock.split_once(&format!("name = \"{package}\"\nversion = \"")).map(|(_, after)| after);
    after.and_then(|a| a.split_once('"')).map_or("unknown", |(version, _)| version).into()
}

/// Its name, with numbers that tell what it is where the name does not: that of a virtual machine's CPU may be short.
fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| info.lines().find(|l| l.starts_with(name)).and_then(|l| l.split(": ").nth(1));
    let [name, family, model] = ["model name", "cpu family", "model\t"].map(|n| field(n).unwrap_or("?").trim());
    format!("{name}, family {family}, model {model}")
}

/// The command line, with the variables that choose instructions.
fn command() -> String {
    let names = ["RUSTFLAGS", "MISTRALRS_FORCE_AVX2", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"];
    let variables = names.into_iter().filter_map(|name| Some((name, env::var(name).ok()?)));
    let mut words: Vec<_> = variables.map(|(name, value)| format!("{name}={}", quoted(&value))).collect();
    words.push("cargo run --release".into());
    words.extend(cfg!(feature = "entrenar").then(|| "--features entrenar".into()));
    words.push("--".into());
    words.extend(env::args().skip(1).map(|arg| quoted(&arg)));
    words.join(" ")
}

fn quoted(word: &str) -> String {
    if word.is_empty() || word.contains(' ') { format!("\"{word}\"") } else { word.into() }
}
