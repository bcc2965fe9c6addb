//! What is measured, and how: one problem for all, products checked before they are timed, all timed in turn.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Vectors multiplied at once.
pub const BATCHES: [usize; 3] = [1, 8, 128];

/// Matrices that are multiplied in turn to read from memory: at most so many, and no more bytes than needed.
const COPIES: usize = 16;
const COLD_BYTES: usize = 150_000_000;

/// A sample of a time takes about so long.
const SAMPLE: Duration = Duration::from_millis(4);

/// A product that takes longer is slow: it gets few rounds and no warming up.
const SLOW: Duration = Duration::from_millis(400);
const SLOW_ROUNDS: usize = 3;

/// More than any 4-bit product loses by rounding its inputs to 8 bits.
const WRONG: f64 = 0.03;

/// The weights `[rows, cols]` before quantization, and the inputs `[128, cols]`; both normally distributed.
pub struct Problem {
    pub rows: usize,
    pub cols: usize,
    pub threads: usize,
    pub weights: Vec<f32>,
    inputs: Vec<f32>,
}

impl Problem {
    pub fn new(rows: usize, cols: usize, threads: usize) -> Self {
        let mut state = 1_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
        };
        // Box and Muller, 1958.
        let mut normal = || (-2.0 * uniform().ln()).sqrt() * (core::f32::consts::TAU * uniform()).cos();
        let weights = (0..rows * cols).map(|_| normal() * 0.02).collect();
        let inputs = (0..BATCHES[2] * cols).map(|_| normal()).collect();
        Self { rows, cols, threads, weights, inputs }
    }

    /// The first vectors, `[batch, cols]`.
    pub fn inputs(&self, batch: usize) -> &[f32] {
        &self.inputs[..batch * self.cols]
    }

    /// How many matrices of so many bytes do not fit in a cache.
    pub fn copies(&self, bytes: usize) -> usize {
        COLD_BYTES.div_ceil(bytes).clamp(2, COPIES)
    }

    /// Largest and root mean square difference of `output`, `[batch, rows]`, from the f64 product with `weights`,
    /// relative to the root mean square of that. Of a large batch, each sixteenth row is checked.
    fn error(&self, weights: &[f32], output: &[f32], batch: usize) -> Result<[f64; 2]> {
        ensure!(weights.len() == self.rows * self.cols, "{} weights", weights.len());
        ensure!(output.len() == self.rows * batch, "{} outputs", output.len());
        let (mut largest, mut squares, mut norm, mut count) = (0.0_f64, 0.0, 0.0, 0.0);
        for row in (0..self.rows).step_by(if batch > 8 { 16 } else { 1 }) {
            let w = &weights[row * self.cols..][..self.cols];
            for (n, x) in self.inputs(batch).chunks(self.cols).enumerate() {
                let exact: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let difference = (f64::from(output[n * self.rows + row]) - exact).abs();
                ensure!(difference.is_finite(), "an output is not finite");
                largest = largest.max(difference);
                squares += difference * difference;
                norm += exact * exact;
                count += 1.0;
            }
        }
        let rms = (norm / count).sqrt();
        Ok([largest / rms, (squares / count).sqrt() / rms])
    }
}

/// Something that multiplies the inputs of its problem with its matrices.
pub trait Peer {
    /// The product of a matrix with the first `batch` inputs.
    fn product(&mut self, matrix: usize, batch: usize);

    /// The last product, `[batch, rows]`.
    fn output(&self, batch: usize) -> Vec<f32>;

    /// Lets its threads sleep, so that they do not disturb the next one.
    fn rest(&mut self) {}
}

/// A peer, what it is, and how many matrices it has.
pub struct Entry {
    pub record: Record,
    pub copies: usize,
    pub batches: &'static [usize],
    pub peer: Box<dyn Peer>,
}

/// A line of the table. Speeds are multiply-adds/ns, which for one vector are weights/ns.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    pub library: String,
    pub version: String,
    pub name: String,
    pub threads: usize,
    pub bits: f64,
    pub cache: Option<f64>,
    pub dram: Option<f64>,
    pub batch8: Option<f64>,
    pub batch128: Option<f64>,
    pub error_max: Option<f64>,
    pub error_rms: Option<f64>,
}

impl Entry {
    pub fn new(library: &str, version: &str, name: &str, bytes: usize, problem: &Problem, peer: Box<dyn Peer>) -> Self {
        let record = Record {
            library: library.into(),
            version: version.into(),
            name: name.into(),
            threads: problem.threads,
            bits: bytes as f64 * 8.0 / (problem.rows * problem.cols) as f64,
            ..Record::default()
        };
        Self { record, copies: problem.copies(bytes), batches: &BATCHES, peer }
    }

    /// Notes the error of one vector and checks that of all batches, against the exact product with the peer's own
    /// weights.
    pub fn check(mut self, problem: &Problem, weights: &[f32]) -> Result<Self> {
        for matrix in [0, self.copies - 1] {
            for &batch in self.batches.iter().take(if matrix == 0 { 3 } else { 1 }) {
                self.peer.product(matrix, batch);
                let [largest, rms] = problem.error(weights, &self.peer.output(batch), batch)?;
                ensure!(rms < WRONG, "wrong: the error of a batch of {batch} is {rms:.1e} of the outputs");
                if batch == 1 {
                    (self.record.error_max, self.record.error_rms) = (Some(largest), Some(rms));
                }
            }
        }
        self.peer.rest();
        Ok(self)
    }
}

/// One time to measure, of a peer.
struct Cell {
    batch: usize,
    cold: bool,
    next: usize,
    repetitions: usize,
    slow: bool,
    times: Vec<f64>,
}

impl Cell {
    fn new(entry: &mut Entry, batch: usize, cold: bool) -> Self {
        entry.peer.product(0, 1);
        let start = Instant::now();
        entry.peer.product(0, batch);
        let time = start.elapsed();
        entry.peer.rest();
        let repetitions = SAMPLE.as_nanos().div_ceil(time.as_nanos().max(1)).clamp(1, COPIES as u128) as usize;
        Self { batch, cold, next: 0, repetitions, slow: time > SLOW, times: Vec::new() }
    }

    fn sample(&mut self, entry: &mut Entry) {
        let mut product = |batch| {
            entry.peer.product(self.next, batch);
            self.next = (self.next + usize::from(self.cold)) % entry.copies;
        };
        if !self.slow {
            product(if self.batch > 8 { 1 } else { self.batch });
        }
        let start = Instant::now();
        (0..self.repetitions).for_each(|_| product(self.batch));
        self.times.push(start.elapsed().as_nanos() as f64 / self.repetitions as f64);
    }

    fn median(&mut self) -> f64 {
        self.times.sort_unstable_by(f64::total_cmp);
        self.times[self.times.len() / 2]
    }
}

/// Times all peers in turn, round by round, so that what disturbs the machine disturbs all alike, and notes medians.
pub fn measure(entries: &mut [Entry], problem: &Problem, rounds: usize) {
    let mut cells: Vec<Vec<Cell>> = entries
        .iter_mut()
        .map(|entry| {
            let kinds = [(1, false), (1, true), (8, false), (128, false)];
            let kinds = kinds.into_iter().filter(|(batch, _)| entry.batches.contains(batch));
            kinds.collect::<Vec<_>>().into_iter().map(|(batch, cold)| Cell::new(entry, batch, cold)).collect()
        })
        .collect();
    for round in 0..rounds {
        for (entry, cells) in entries.iter_mut().zip(&mut cells) {
            for cell in cells.iter_mut().filter(|c| !c.slow || round < SLOW_ROUNDS) {
                cell.sample(entry);
            }
            entry.peer.rest();
            // Waiting threads of a pool spin for a while before they sleep.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    for (entry, cells) in entries.iter_mut().zip(&mut cells) {
        for cell in cells {
            let speed = Some((problem.rows * problem.cols * cell.batch) as f64 / cell.median());
            let record = &mut entry.record;
            match (cell.batch, cell.cold) {
                (1, false) => record.cache = speed,
                (1, true) => record.dram = speed,
                (8, _) => record.batch8 = speed,
                _ => record.batch128 = speed,
            }
        }
    }
}
