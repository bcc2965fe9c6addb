//! What is measured, and how: one problem for all, products checked before they are timed, all timed in turn.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Vectors multiplied at once.
pub const BATCHES: [usize; 3] = [1, 8, 128];

/// Matrices that are multiplied in turn to read from memory: at most this many, and no more bytes than needed.
const COPIES: usize = 16;
const COLD_BYTES: usize = 150_000_000;

/// A sample of a time takes about so long.
const SAMPLE: Duration = Duration::from_millis(4);

/// What takes longer is slow: it gets few rounds and no warming up.
const SLOW: Duration = Duration::from_millis(400);
const SLOW_ROUNDS: usize = 3;

/// Rows that are quantized and dequantized for timing: 4 MB of f32, which a cache holds.
const CONVERTED_ROWS: usize = 256;

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

    /// The weights that are quantized and dequantized for timing.
    pub fn converted(&self) -> &[f32] {
        &self.weights[..self.rows.min(CONVERTED_ROWS) * self.cols]
    }

    /// How many matrices of this many bytes do not fit in a cache.
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

    /// Quantizes [`Problem::converted`], given here, and keeps the result for dequantizing. False if there is no such
    /// operation.
    fn quantize(&mut self, _weights: &[f32]) -> bool {
        false
    }

    /// Restores what was quantized last, as f32.
    fn dequantize(&mut self) {}

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

/// A line of the table. Speeds of products are in GMAC/s, those of conversions in billions of weights per second.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    pub library: String,
    pub version: String,
    pub name: String,
    /// The process that measured it, which has a pure read of its own to compare with.
    pub process: String,
    pub threads: usize,
    pub bits: f64,
    pub cache: Option<f64>,
    pub dram: Option<f64>,
    pub batch8: Option<f64>,
    pub batch128: Option<f64>,
    pub quantize: Option<f64>,
    pub dequantize: Option<f64>,
    pub error_max: Option<f64>,
    pub error_rms: Option<f64>,
}

impl Entry {
    pub fn new(library: &str, version: &str, name: &str, bytes: usize, problem: &Problem, peer: Box<dyn Peer>) -> Self {
        let record = Record {
            library: library.into(),
            version: version.into(),
            name: name.into(),
            process: "rust".into(),
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

/// Something to time.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// The product of one matrix with a batch.
    Hot(usize),
    /// Products of one vector with one matrix after the other.
    Cold,
    Quantize,
    Dequantize,
}

/// One time to measure, of a peer.
struct Cell {
    work: Work,
    next: usize,
    repetitions: usize,
    slow: bool,
    times: Vec<f64>,
}

impl Cell {
    /// Runs the work once, for its time.
    fn new(entry: &mut Entry, problem: &Problem, work: Work) -> Self {
        let mut cell = Self { work, next: 0, repetitions: 1, slow: false, times: Vec::new() };
        if let Work::Hot(_) | Work::Cold = work {
            entry.peer.product(0, 1);
        }
        let start = Instant::now();
        cell.run(entry, problem);
        let time = start.elapsed();
        entry.peer.rest();
        cell.repetitions = SAMPLE.as_nanos().div_ceil(time.as_nanos().max(1)).clamp(1, COPIES as u128) as usize;
        cell.slow = time > SLOW;
        cell
    }

    fn run(&mut self, entry: &mut Entry, problem: &Problem) {
        match self.work {
            Work::Hot(batch) => entry.peer.product(0, batch),
            Work::Cold => {
                entry.peer.product(self.next, 1);
                self.next = (self.next + 1) % entry.copies;
            }
            Work::Quantize => {
                entry.peer.quantize(problem.converted());
            }
            Work::Dequantize => entry.peer.dequantize(),
        }
    }

    fn sample(&mut self, entry: &mut Entry, problem: &Problem) {
        if !self.slow {
            match self.work {
                // Long enough to warm up by itself.
                Work::Hot(batch) if batch > 8 => entry.peer.product(0, 1),
                _ => self.run(entry, problem),
            }
        }
        let start = Instant::now();
        (0..self.repetitions).for_each(|_| self.run(entry, problem));
        self.times.push(start.elapsed().as_nanos() as f64 / self.repetitions as f64);
    }

    fn median(&mut self) -> f64 {
        self.times.sort_unstable_by(f64::total_cmp);
        self.times[self.times.len() / 2]
    }
}

/// All times to measure. A round takes a sample of each in turn, so that what disturbs the machine disturbs all alike.
pub struct Measurement<'a> {
    problem: &'a Problem,
    entries: Vec<(Entry, Vec<Cell>)>,
    rounds: usize,
}

impl<'a> Measurement<'a> {
    /// Conversions are timed with one thread only: hardly a peer has them on more.
    pub fn new(entries: Vec<Entry>, problem: &'a Problem) -> Self {
        let cells = |mut entry: Entry| {
            let mut works: Vec<_> = entry.batches.iter().map(|batch| Work::Hot(*batch)).collect();
            works.insert(1, Work::Cold);
            if problem.threads == 1 && entry.peer.quantize(problem.converted()) {
                works.extend([Work::Quantize, Work::Dequantize]);
            }
            let cells = works.into_iter().map(|work| Cell::new(&mut entry, problem, work)).collect();
            (entry, cells)
        };
        Self { problem, entries: entries.into_iter().map(cells).collect(), rounds: 0 }
    }

    pub fn round(&mut self) {
        for (entry, cells) in &mut self.entries {
            for cell in cells.iter_mut().filter(|c| !c.slow || self.rounds < SLOW_ROUNDS) {
                cell.sample(entry, self.problem);
            }
            entry.peer.rest();
            // Waiting threads of a pool spin for a while before they sleep.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.rounds += 1;
    }

    /// The medians.
    pub fn finish(self) -> Vec<Record> {
        let Problem { rows, cols, .. } = *self.problem;
        let record = |(mut entry, cells): (Entry, Vec<Cell>)| {
            for mut cell in cells {
                let record = &mut entry.record;
                let (count, field) = match cell.work {
                    Work::Hot(1) => (rows * cols, &mut record.cache),
                    Work::Hot(8) => (rows * cols * 8, &mut record.batch8),
                    Work::Hot(batch) => (rows * cols * batch, &mut record.batch128),
                    Work::Cold => (rows * cols, &mut record.dram),
                    Work::Quantize => (self.problem.converted().len(), &mut record.quantize),
                    Work::Dequantize => (self.problem.converted().len(), &mut record.dequantize),
                };
                *field = Some(count as f64 / cell.median());
            }
            entry.record
        };
        self.entries.into_iter().map(record).collect()
    }
}
