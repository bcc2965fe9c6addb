//! Two processes measure, this program and `peers.py`, each with one number of threads: some libraries read theirs from
//! the environment once. They take their rounds in turn, so that one machine state does not meet one process alone.
//!
//! A worker prints `@ready`, then `@done` for each line that it is sent, and `@result` with JSON when its input ends.
//! Other lines are what libraries print.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::Options;
use crate::measure::{Measurement, Problem};
use crate::run::{Missing, Run};

/// Measures all, with one process for each number of threads and language.
pub fn collect(options: &Options) -> Result<Run> {
    let mut run = Run::new(options.shape());
    for threads in options.threads.map_or(vec![1, 2], |n| vec![n]) {
        let mut workers = Vec::new();
        for command in commands(options, threads)? {
            workers.push(Worker::start(command)?);
        }
        for round in 0..run.rounds {
            eprintln!("threads: {threads}, round {} of {}", round + 1, run.rounds);
            workers.iter_mut().try_for_each(Worker::round)?;
        }
        for worker in workers {
            run.add(worker.finish()?);
        }
    }
    Ok(run)
}

fn commands(options: &Options, threads: usize) -> Result<Vec<Command>> {
    let executable = env::current_exe()?;
    let mut programs = vec![vec![executable.as_os_str().to_owned()]];
    if let Some(python) = &options.python {
        // The library that Cargo builds beside the program.
        let library = format!("{}yardstick{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
        let library = executable.with_file_name(library);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers.py");
        programs.push(vec![python.into(), script.into(), "--yardstick".into(), library.into()]);
    }
    let command = |program: Vec<_>| {
        let mut words = program;
        if let (Some(core), 1) = (&options.core, threads) {
            words.splice(0..0, ["taskset".into(), "-c".into(), core.into()]);
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["--only", &options.only]).args(options.quick.then_some("--quick"));
        command.args(["--worker", "--threads", &threads.to_string()]);
        command.envs(["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS", "OMP_NUM_THREADS"].map(|n| (n, threads.to_string())));
        command
    };
    Ok(programs.into_iter().map(command).collect())
}

struct Worker {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Worker {
    fn start(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("{command:?}"))?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut worker = Self { child, lines };
        worker.wait_for("@ready")?;
        Ok(worker)
    }

    fn round(&mut self) -> Result<()> {
        self.child.stdin.as_mut().context("its input is piped")?.write_all(b"\n")?;
        self.wait_for("@done").map(drop)
    }

    fn finish(mut self) -> Result<Run> {
        drop(self.child.stdin.take());
        let result = self.wait_for("@result")?;
        self.child.wait()?;
        Ok(serde_json::from_str(&result)?)
    }

    /// What follows the marker in the next line that starts with it.
    fn wait_for(&mut self, marker: &str) -> Result<String> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if self.lines.read_until(b'\n', &mut line)? == 0 {
                bail!("a worker ended before {marker}: {}", self.child.wait()?);
            }
            if let Some(rest) = String::from_utf8_lossy(&line).strip_prefix(marker) {
                return Ok(rest.into());
            }
        }
    }
}

/// The worker's side: measures with one number of threads, in this process.
pub fn work(options: &Options) -> Result<()> {
    let shape @ [rows, cols, _] = options.shape();
    let threads = options.threads.context("--worker needs --threads")?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| {
        let problem = Problem::new(rows, cols, threads);
        let (mut entries, mut run) = (Vec::new(), Run::new(shape));
        for (name, make) in crate::PEERS.into_iter().filter(|(name, _)| name.contains(&options.only)) {
            let made = make.map(|make| make(&problem));
            for entry in made.unwrap_or_else(|| vec![Err(anyhow::anyhow!("built without this feature"))]) {
                match entry {
                    Ok(entry) => entries.push(entry),
                    Err(error) => run.missing.push(Missing { name: name.into(), why: format!("{error:#}") }),
                }
            }
        }
        let mut measurement = Measurement::new(entries, &problem);
        println!("@ready");
        for line in std::io::stdin().lines() {
            line?;
            measurement.round();
            println!("@done");
        }
        run.records = measurement.finish();
        println!("@result {}", serde_json::to_string(&run)?);
        Ok(())
    })
}
