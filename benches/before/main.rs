//! The kernels of two commits in one process, timed in turn; `run.sh` builds it. Prints medians in GMAC/s, and the median
//! of the ratios of a round.
//!
//! Arguments: the name of an instruction set, and a text that the names of cases must have. Where the older commit does not
//! have the instruction set, AVX2 stands in for it.

use std::hint::black_box;
use std::time::Instant;

/// Rounds, each of which times both versions for at least this many seconds.
const ROUNDS: usize = 15;
const SECONDS: f64 = 0.01;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    rows: usize,
    cols: usize,
    block: usize,
    nested: bool,
    batch: usize,
    f32: bool,
    /// Matrices that are multiplied in turn.
    matrices: usize,
}

const DEFAULT: Case =
    Case { name: "", rows: 512, cols: 4096, block: 64, nested: false, batch: 1, f32: false, matrices: 1 };

/// So many of 1 MB do not fit into the last cache.
const DRAM: usize = 192;

const CASES: &[Case] = &[
    Case { name: "one vector", ..DEFAULT },
    Case { name: "one vector, nested absmax", nested: true, ..DEFAULT },
    Case { name: "one vector, blocks of 256", block: 256, ..DEFAULT },
    Case { name: "one vector, 384 columns", rows: 4096, cols: 384, ..DEFAULT },
    Case { name: "one vector, from DRAM", matrices: DRAM, ..DEFAULT },
    Case { name: "one vector, from DRAM, nested absmax", matrices: DRAM, nested: true, ..DEFAULT },
    Case { name: "batch of 2", batch: 2, ..DEFAULT },
    Case { name: "batch of 4", batch: 4, ..DEFAULT },
    Case { name: "batch of 8", batch: 8, ..DEFAULT },
    Case { name: "batch of 8, nested absmax", batch: 8, nested: true, ..DEFAULT },
    Case { name: "batch of 8, 384 columns", rows: 4096, cols: 384, batch: 8, ..DEFAULT },
    Case { name: "batch of 32", batch: 32, ..DEFAULT },
    Case { name: "batch of 128", batch: 128, ..DEFAULT },
    Case { name: "batch of 128, 384 columns", rows: 4096, cols: 384, batch: 128, ..DEFAULT },
    Case { name: "one vector, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, ..DEFAULT },
    Case { name: "batch of 8, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, batch: 8, ..DEFAULT },
    Case { name: "batch of 128, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, batch: 128, ..DEFAULT },
    Case { name: "f32, one vector", f32: true, ..DEFAULT },
    Case { name: "f32, one vector, 384 columns", f32: true, rows: 4096, cols: 384, ..DEFAULT },
    Case {
        name: "f32, one vector, 384 columns, blocks of 256",
        f32: true,
        rows: 4096,
        cols: 384,
        block: 256,
        ..DEFAULT
    },
    Case { name: "f32, batch of 8", f32: true, batch: 8, ..DEFAULT },
    Case { name: "f32, batch of 128", f32: true, batch: 128, ..DEFAULT },
    Case { name: "f32, batch of 128, 384 columns", f32: true, rows: 4096, cols: 384, batch: 128, ..DEFAULT },
    Case {
        name: "f32, batch of 128, 384 columns, blocks of 256",
        f32: true,
        rows: 4096,
        cols: 384,
        block: 256,
        batch: 128,
        ..DEFAULT
    },
];

/// What both versions multiply.
struct Data {
    packed: Vec<Vec<u8>>,
    absmax: Vec<f32>,
    codes: Vec<u8>,
    nested: Vec<f32>,
    inputs: Vec<f32>,
}

impl Data {
    fn new(case: Case) -> Self {
        let mut state = 1_u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let blocks = (case.rows * case.cols).div_ceil(case.block);
        let packed = (0..case.rows * case.cols / 2).map(|_| random() as u8).collect();
        let mut floats = |n: usize| (0..n).map(|_| random() as f32 / 16_777_216.0 + 0.25).collect::<Vec<f32>>();
        let (absmax, nested, inputs) = (floats(blocks), floats(blocks.div_ceil(256)), floats(case.batch * case.cols));
        let codes = absmax.iter().map(|x| (x * 200.0) as u8).collect();
        Self { packed: vec![packed; case.matrices], absmax, codes, nested, inputs }
    }
}

/// A function that returns the seconds and the outputs of some runs of `$version`.
macro_rules! version {
    ($version:ident) => {
        mod $version {
            use ::$version::{Absmax, Activations, BlockSize, DYNAMIC_MAP, Kernels, NestedAbsmax, Nf4Matrix};

            use super::{Case, Data};

            pub fn run<'a>(case: Case, data: &'a Data, isa: &str) -> Box<dyn FnMut(usize) -> (f64, Vec<f32>) + 'a> {
                let named = |name: &str| Kernels::available().find(|kernels| kernels.isa().name() == name);
                let kernels = named(isa).or_else(|| named("avx2")).expect("an instruction set of this CPU");
                let block = BlockSize::new(case.block).expect("a block size");
                let absmax = if case.nested {
                    let nested = NestedAbsmax::new(&data.codes, &DYNAMIC_MAP, &data.nested, 0.5);
                    Absmax::Nested(nested.expect("the lengths fit"))
                } else {
                    Absmax::Plain(&data.absmax)
                };
                let matrices: Vec<_> =
                    data.packed.iter().map(|p| Nf4Matrix::new(p, absmax, case.rows, case.cols, block)).collect();
                let matrices: Vec<_> = matrices.into_iter().map(|matrix| matrix.expect("the lengths fit")).collect();
                let mut values = vec![0; case.batch * Activations::values_len(case.cols, block)];
                let mut scales = vec![0.0; case.batch * Activations::scales_len(case.cols, block)];
                let mut out = vec![0.0; case.rows * case.batch];
                let mut next = 0;
                Box::new(move |times| {
                    let inputs = &data.inputs;
                    let x = kernels.quantize_activations_batch(inputs, case.cols, block, &mut values, &mut scales);
                    let x = x.expect("the lengths fit");
                    let start = super::Instant::now();
                    for _ in 0..times {
                        let matrix = &matrices[next % matrices.len()];
                        next += 1;
                        let done = match (case.f32, case.batch) {
                            (true, _) => kernels.gemm_f32(matrix, inputs, &mut out),
                            (false, 1) => kernels.gemv(matrix, &x, &mut out),
                            (false, _) => kernels.gemm(matrix, &x, &mut out),
                        };
                        done.expect("the lengths fit");
                        super::black_box(&mut out);
                    }
                    (start.elapsed().as_secs_f64(), out.clone())
                })
            }
        }
    };
}

version!(before);
version!(after);

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let isa = arguments.next().unwrap_or_else(|| "avx2".to_owned());
    let text = arguments.next().unwrap_or_default();
    println!("| {isa} | before | after | |\n|---|--:|--:|--:|");
    for &case in CASES.iter().filter(|case| case.name.contains(&text)) {
        let data = Data::new(case);
        let mut versions = [before::run(case, &data, &isa), after::run(case, &data, &isa)];
        let [(seconds, old), (_, new)] = versions.each_mut().map(|run| run(1));
        assert!(old.iter().zip(&new).all(|(old, new)| old.to_bits() == new.to_bits()), "{}: other bits", case.name);
        let times = ((SECONDS / seconds) as usize).max(1);
        let rounds: Vec<[f64; 2]> = (0..ROUNDS).map(|_| versions.each_mut().map(|run| run(times).0)).collect();
        let work = (case.rows * case.cols * case.batch * times) as f64 / 1e9;
        let [old, new] = [0, 1].map(|v| work / median(rounds.iter().map(|round| round[v]).collect()));
        let ratio = median(rounds.iter().map(|[old, new]| old / new).collect());
        println!("| {} | {old:.1} | {new:.1} | {ratio:.2} x |", case.name);
    }
}
