//! `nf4` beside other products of 4-bit weights on this machine: one run, one table.
//!
//! ```sh
//! cargo run --release --features entrenar -- [--quick] [--json PATH] [--python PYTHON] [--only TEXT] [--threads N]
//! ```
//!
//! Run it in this folder, so that `.cargo/config.toml` is used. llama.cpp needs CMake, a C++ compiler and libclang;
//! `--no-default-features --features candle,gemm` leaves out what does not build. `--python` names an interpreter with
//! `requirements.txt`, to run `peers.py` too. `--quick` takes small matrices and few rounds: to see that everything
//! works, not for figures. Each number of threads has a process of its own, as some libraries read theirs from the
//! environment once.
//!
//! Peers use AVX-512 where there is some. What they are without, on the same CPU (but onnxruntime, which has no such
//! setting):
//!
//! ```sh
//! MISTRALRS_FORCE_AVX2=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 RUSTFLAGS="-C target-cpu=x86-64-v3" \
//!     cargo run --release --target-dir target/avx2
//! ```

mod foreign;
mod measure;
mod ours;

#[cfg(feature = "candle")]
mod candle;
#[cfg(feature = "gemm")]
mod dense;
#[cfg(feature = "entrenar")]
mod entrenar;
#[cfg(feature = "llama")]
mod llama;

use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use measure::{Entry, Problem, Record, measure};

/// A run, as `--json` writes it and `plot.py` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Run {
    cpu: String,
    rows: usize,
    cols: usize,
    rounds: usize,
    records: Vec<Record>,
    missing: Vec<Missing>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Missing {
    name: String,
    why: String,
}

#[derive(Debug, Clone, Default)]
struct Options {
    quick: bool,
    json: Option<String>,
    python: Option<String>,
    only: String,
    threads: Option<usize>,
    /// Measure here and print JSON, for the process that collects.
    worker: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let (mut options, mut args) = (Self::default(), env::args().skip(1));
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--worker" => options.worker = true,
                "--json" => options.json = Some(value()?),
                "--python" => options.python = Some(value()?),
                "--only" => options.only = value()?,
                "--threads" => options.threads = Some(value()?.parse()?),
                _ => bail!("unknown argument {arg}"),
            }
        }
        Ok(options)
    }

    /// Rows, columns, rounds.
    fn shape(&self) -> [usize; 3] {
        if self.quick { [1024, 1024, 3] } else { [4096, 4096, 15] }
    }
}

/// Measures with one number of threads, in this process.
fn work(options: &Options) -> Result<Run> {
    let [rows, cols, rounds] = options.shape();
    let threads = options.threads.context("--worker needs --threads")?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| {
        let problem = Problem::new(rows, cols, threads);
        let (mut entries, mut missing) = (Vec::new(), Vec::new());
        type Make = Option<fn(&Problem) -> Vec<Result<Entry>>>;
        let peers: [(&str, Make); 6] = [
            ("a pure read", Some(|p| vec![Ok(ours::read(p))])),
            ("nf4", Some(ours::entries)),
            #[cfg(feature = "candle")]
            ("candle", Some(candle::entries)),
            #[cfg(not(feature = "candle"))]
            ("candle", None),
            #[cfg(feature = "llama")]
            ("llama.cpp", Some(llama::entries)),
            #[cfg(not(feature = "llama"))]
            ("llama.cpp", None),
            #[cfg(feature = "gemm")]
            ("gemm", Some(dense::entries)),
            #[cfg(not(feature = "gemm"))]
            ("gemm", None),
            #[cfg(feature = "entrenar")]
            ("entrenar", Some(entrenar::entries)),
            #[cfg(not(feature = "entrenar"))]
            ("entrenar", None),
        ];
        for (name, make) in peers.into_iter().filter(|(name, _)| name.contains(&options.only)) {
            let Some(make) = make else {
                missing.push(Missing { name: name.into(), why: "built without this feature".into() });
                continue;
            };
            for entry in make(&problem) {
                match entry {
                    Ok(entry) => entries.push(entry),
                    Err(error) => missing.push(Missing { name: name.into(), why: format!("{error:#}") }),
                }
            }
        }
        measure(&mut entries, &problem, rounds);
        let records = entries.into_iter().map(|e| e.record).collect();
        Ok(Run { cpu: cpu(), rows, cols, rounds, records, missing })
    })
}

/// Starts a process for each number of threads, and `peers.py`.
fn collect(options: &Options) -> Result<Run> {
    let [rows, cols, rounds] = options.shape();
    let mut run = Run { cpu: cpu(), rows, cols, rounds, ..Run::default() };
    let threads = options.threads.map_or(vec![1, 2], |n| vec![n]);
    for n in threads {
        let n = n.to_string();
        let mut commands = vec![Command::new(env::current_exe()?)];
        commands[0].args(["--only", &options.only]);
        if let Some(python) = &options.python {
            commands.push(Command::new(python));
            commands[1].arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers.py"));
        }
        for mut command in commands {
            command.args(["--worker", "--threads", &n]).args(options.quick.then_some("--quick"));
            command.envs(["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS", "OMP_NUM_THREADS"].map(|name| (name, &n)));
            let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("{command:?}"))?;
            ensure!(output.status.success(), "{command:?}: {}", output.status);
            // Libraries may print too; the result is the last line.
            let text = String::from_utf8(output.stdout)?;
            let part: Run = serde_json::from_str(text.lines().last().context("no result")?)?;
            run.records.extend(part.records);
            run.missing.extend(part.missing);
        }
    }
    run.missing.sort_by(|a, b| a.name.cmp(&b.name));
    run.missing.dedup();
    Ok(run)
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| info.lines().find(|l| l.starts_with(name)).and_then(|l| l.split(": ").nth(1));
    let [name, family, model] = ["model name", "cpu family", "model\t"].map(|n| field(n).unwrap_or("?").trim());
    let wide = if info.contains(" avx512f ") { ", with AVX-512" } else { "" };
    let built = if cfg!(target_feature = "avx512f") { "AVX-512" } else { "less than AVX-512" };
    format!("{name} (family {family}, model {model}{wide}), peers built for {built}")
}

fn print(run: &Run) {
    let threads = run.records.iter().map(|r| r.threads).max().unwrap_or(0);
    println!("{}; {} x {}, f32 in and out; medians of {} rounds.", run.cpu, run.rows, run.cols, run.rounds);
    println!("One vector in weights/ns, batches in multiply-adds/ns. The error is that of one vector, relative to the");
    println!("root mean square of the exact product with the peer's own quantized weights.");
    for n in 1..=threads {
        let mut records: Vec<_> = run.records.iter().filter(|r| r.threads == n).collect();
        if records.is_empty() {
            continue;
        }
        records.sort_by(|a, b| b.cache.partial_cmp(&a.cache).unwrap_or(core::cmp::Ordering::Equal));
        println!("\n| threads: {n} | bits | in cache | DRAM | batch 8 | batch 128 | error, rms | largest |");
        println!("|---|--:|--:|--:|--:|--:|--:|--:|");
        for r in records {
            let speed = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.*}", if x < 10.0 { 2 } else { 1 }));
            let error = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.0e}"));
            println!(
                "| {} | {:.1} | {} | {} | {} | {} | {} | {} |",
                r.name,
                r.bits,
                speed(r.cache),
                speed(r.dram),
                speed(r.batch8),
                speed(r.batch128),
                error(r.error_rms),
                error(r.error_max)
            );
        }
    }
    for Missing { name, why } in &run.missing {
        println!("\nNot measured: {name}: {why}");
    }
    let versioned = run.records.iter().filter(|r| !r.version.is_empty());
    let mut versions: Vec<_> = versioned.map(|r| format!("{} {}", r.library, r.version)).collect();
    versions.sort();
    versions.dedup();
    println!("\nVersions: {}.", versions.join(", "));
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    if options.worker {
        println!("{}", serde_json::to_string(&work(&options)?)?);
        return Ok(());
    }
    let run = collect(&options)?;
    print(&run);
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&run)? + "\n")?;
    }
    Ok(())
}
