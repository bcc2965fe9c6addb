//! `nf4 bench`: the products and conversions on every instruction set of this machine, beside a pure read.

use core::hint::black_box;
use core::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nf4::{AbsmaxBuf, BlockSize, Float, Kernels, Nf4Matrix, bf16, packed_len};
use serde::Serialize;
use serde_json::json;

use crate::generator::Generator;
use crate::memory;
use crate::report::Prepared;
use crate::text::Text;

/// Measure every instruction set of this machine on a matrix.
///
/// Everything runs on one thread. All operations are timed in turn, round by round, so that a disturbance hits all alike, and
/// medians are reported. GMAC/s counts a multiply-add for each weight and vector; for conversions it counts weights. GB/s
/// counts the packed bytes (codes and scales) of the matrix, so that it compares with memory bandwidth; `of read` is the
/// share of a pure read of the same bytes in the same run.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Rows x columns of the weight matrix
    #[arg(long, default_value = "4096x4096", value_name = "ROWSxCOLS")]
    shape: Shape,
    /// Vectors that are multiplied at once
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Weights that share a scale: 32, 64, 128, ..., 4096
    #[arg(long, default_value = "64", value_name = "N", value_parser = crate::quantize::block_size)]
    block_size: BlockSize,
    /// Double-quantize the scales
    #[arg(long)]
    double_quant: bool,
    /// Rounds; the median of each operation's times is reported
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[arg(skip)]
    only_products: bool,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: usize,
    cols: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parts = s.split_once('x').and_then(|(rows, cols)| Some((rows.parse().ok()?, cols.parse().ok()?)));
        match parts {
            Some((rows, cols)) if rows > 0 && cols > 0 => Ok(Self { rows, cols }),
            _ => Err("expected two numbers above 0, such as 4096x4096".to_owned()),
        }
    }
}

impl core::fmt::Display for Shape {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}x{}", self.rows, self.cols)
    }
}

/// An operation, ready to run.
struct Operation<'a> {
    name: &'static str,
    isa: &'static str,
    /// How often it uses each weight.
    uses: usize,
    run: Box<dyn FnMut() + 'a>,
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Codes and scales of the matrix.
    bytes: usize,
    /// The last one is a pure read of these bytes.
    pub(crate) operations: Vec<Measurement>,
}

/// What was measured of an operation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Measurement {
    pub(crate) operation: &'static str,
    pub(crate) isa: &'static str,
    pub(crate) median_ns: f64,
    pub(crate) gmac_per_s: f64,
    pub(crate) gb_per_s: f64,
    pub(crate) share_of_read: f64,
}

impl Bench {
    /// Measures the products alone, with blocks of 64.
    pub(crate) fn products([rows, cols]: [usize; 2], batch: usize, rounds: u32) -> Self {
        let shape = Shape { rows, cols };
        Self { shape, batch, block_size: BlockSize::B64, double_quant: false, rounds, only_products: true }
    }

    pub(crate) fn run(&self) -> Result<Prepared> {
        Ok(self.report(&self.measure()?))
    }

    pub(crate) fn measure(&self) -> Result<Measured> {
        ensure!(self.batch > 0, "--batch 0: expected at least 1");
        let Shape { rows, cols } = self.shape;
        let large = || format!("--shape {} --batch {} does not fit in memory", self.shape, self.batch);
        let weights = noise(rows.checked_mul(cols).with_context(large)?, 1).with_context(large)?;
        let inputs = noise(cols.checked_mul(self.batch).with_context(large)?, 2).with_context(large)?;
        let outputs = memory::filled(rows.checked_mul(self.batch).with_context(large)?, 0.0).with_context(large)?;
        let (kernels, block_size) = (Kernels::detect(), self.block_size);
        let mut packed = memory::filled(packed_len(weights.len()), 0).with_context(large)?;
        let mut absmax = memory::filled(block_size.blocks(weights.len()), 0.0).with_context(large)?;
        kernels.quantize(&weights, block_size, &mut packed, &mut absmax)?;
        let scales =
            if self.double_quant { AbsmaxBuf::double_quantize(&absmax)? } else { AbsmaxBuf::plain(absmax.clone()) };
        let matrix = Nf4Matrix::new(&packed, scales.view(), rows, cols, block_size)?;

        let mut operations = Vec::new();
        for kernels in Kernels::available() {
            operations.extend(self.multiplications(kernels, matrix, &inputs, &outputs)?);
            if !self.only_products {
                operations.extend(conversions(kernels, matrix, &weights, &packed, &absmax));
            }
        }
        let read = Box::new(|| {
            black_box(xor(black_box(&packed)));
            black_box(absmax.iter().fold(0, |sum, x| sum ^ x.to_bits()));
        });
        operations.push(Operation { name: "read", isa: "any", uses: 1, run: read });
        let medians = self.medians(&mut operations);
        let (bytes, read) = (packed.len() + scales.memory_bytes(), medians[medians.len() - 1]);
        let measurement = |(operation, time): (&Operation<'_>, f64)| Measurement {
            operation: operation.name,
            isa: operation.isa,
            median_ns: time,
            gmac_per_s: (weights.len() * operation.uses) as f64 / time,
            gb_per_s: bytes as f64 / time,
            share_of_read: read / time,
        };
        Ok(Measured { bytes, operations: operations.iter().zip(medians).map(measurement).collect() })
    }

    /// The products of the whole batch, from inputs in f32 to outputs in f32.
    fn multiplications<'a>(
        &self,
        kernels: Kernels,
        matrix: Nf4Matrix<'a>,
        inputs: &'a [f32],
        outputs: &[f32],
    ) -> Result<Vec<Operation<'a>>> {
        let (cols, block_size, batch) = (matrix.cols(), self.block_size, self.batch);
        let values_len = nf4::Activations::values_len(cols, block_size) * batch;
        let scales_len = nf4::Activations::scales_len(cols, block_size) * batch;
        let (mut values, mut scales) = (vec![0; values_len], vec![0.0; scales_len]);
        // The shapes fit each other once, so they do every time.
        kernels.quantize_activations_batch(inputs, cols, block_size, &mut values, &mut scales)?;
        let mut y = outputs.to_vec();
        let sixteen_by_four = Box::new(move || {
            let activations = kernels.quantize_activations_batch(inputs, cols, block_size, &mut values, &mut scales);
            let activations = activations.expect("checked above");
            kernels.gemm(black_box(&matrix), &activations, &mut y).expect("outputs for each row and vector");
        });
        let values_len = nf4::Activations8x8::values_len(cols) * batch;
        let scales_len = nf4::Activations8x8::scales_len(cols) * batch;
        let (mut values, mut scales) = (vec![0; values_len], vec![0.0; scales_len]);
        let mut y = outputs.to_vec();
        let eight_by_eight = Box::new(move || {
            let activations = kernels.quantize_activations_8x8_batch(inputs, cols, &mut values, &mut scales);
            let activations = activations.expect("buffers for all vectors");
            kernels.gemm_8x8(black_box(&matrix), &activations, &mut y).expect("outputs for each row and vector");
        });
        let mut y = outputs.to_vec();
        let exact = Box::new(move || {
            kernels.gemm_f32(black_box(&matrix), inputs, &mut y).expect("outputs for each row and vector");
        });
        let isa = kernels.isa().name();
        Ok(vec![
            Operation { name: "product 16x4", isa, uses: batch, run: sixteen_by_four },
            Operation { name: "product 8x8", isa, uses: batch, run: eight_by_eight },
            Operation { name: "product f32", isa, uses: batch, run: exact },
        ])
    }

    /// The median time of each operation in nanoseconds, after one run to warm up.
    fn medians(&self, operations: &mut [Operation<'_>]) -> Vec<f64> {
        let mut times = vec![Vec::new(); operations.len()];
        for round in 0..=self.rounds {
            for (operation, times) in operations.iter_mut().zip(&mut times) {
                let start = Instant::now();
                (operation.run)();
                if round > 0 {
                    times.push(start.elapsed().as_nanos() as f64);
                }
            }
        }
        let median = |mut t: Vec<f64>| {
            t.sort_unstable_by(f64::total_cmp);
            t[t.len() / 2].max(1.0)
        };
        times.into_iter().map(median).collect()
    }

    fn report(&self, measured: &Measured) -> Prepared {
        let mut rows = vec![["", "", "GMAC/s", "GB/s", "of read"].map(str::to_owned).to_vec()];
        for m in &measured.operations {
            let cells = [
                format!("{:.2}", m.gmac_per_s),
                format!("{:.2}", m.gb_per_s),
                format!("{:.0} %", m.share_of_read * 100.0),
            ];
            rows.push([m.operation, m.isa].map(str::to_owned).into_iter().chain(cells).collect());
        }
        let (shape, batch, block) = (self.shape, self.batch, self.block_size.get());
        let scales = if self.double_quant { "double-quantized" } else { "plain" };
        let rounds = self.rounds;
        let mut text = Text::default();
        text.line(format_args!(
            "{shape}, batch {batch}, block {block}, {scales} scales, one thread, medians of {rounds} rounds"
        ));
        text.table(&rows);
        let json = json!({
            "shape": [shape.rows, shape.cols],
            "batch": batch,
            "block_size": block,
            "double_quant": self.double_quant,
            "rounds": rounds,
            "packed_bytes": measured.bytes,
            "results": measured.operations,
        });
        Prepared::report(text, json, true)
    }
}

/// Quantization and its inverse.
fn conversions<'a>(
    kernels: Kernels,
    matrix: Nf4Matrix<'a>,
    weights: &'a [f32],
    packed: &[u8],
    absmax: &[f32],
) -> Vec<Operation<'a>> {
    fn dequantize<'a, T: Float>(kernels: Kernels, matrix: Nf4Matrix<'a>, len: usize) -> Box<dyn FnMut() + 'a> {
        let mut out = vec![T::from_f32(0.0); len];
        Box::new(move || kernels.dequantize(black_box(&matrix), &mut out).expect("made for this matrix"))
    }
    let (isa, block_size) = (kernels.isa().name(), matrix.block_size());
    let (mut packed, mut absmax) = (packed.to_vec(), absmax.to_vec());
    let quantize = Box::new(move || {
        kernels.quantize(black_box(weights), block_size, &mut packed, &mut absmax).expect("made for these weights");
    });
    vec![
        Operation { name: "quantize f32", isa, uses: 1, run: quantize },
        Operation { name: "dequantize f32", isa, uses: 1, run: dequantize::<f32>(kernels, matrix, weights.len()) },
        Operation { name: "dequantize bf16", isa, uses: 1, run: dequantize::<bf16>(kernels, matrix, weights.len()) },
    ]
}

/// A read of all bytes that keeps the loads and does nothing else.
fn xor(bytes: &[u8]) -> [u64; 16] {
    bytes.as_chunks::<128>().0.iter().fold([0; 16], |mut sums, chunk| {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
        sums
    })
}

/// Uniform numbers in `[-0.5, 0.5)`.
fn noise(len: usize, seed: u64) -> Result<Vec<f32>> {
    let (mut values, mut generator) = (memory::filled(len, 0.0)?, Generator(seed));
    values.fill_with(|| generator.uniform() - 0.5);
    Ok(values)
}
