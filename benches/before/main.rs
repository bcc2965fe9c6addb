//! The kernels of two commits in one process, timed in turn; `run.sh` builds it. Prints medians in GMAC/s, and the median
//! of the ratios of a round. 8x8 products, which the older commit does not have, are timed beside its 16x4 ones.
//!
//! Arguments: the name of an instruction set, and a text that the names of cases must have. Where the older commit does not
//! have the instruction set, AVX2 stands in for it.

use std::hint::black_box;
use std::time::Instant;

/// Rounds, each of which times both versions for at least this many seconds.
const ROUNDS: usize = 15;
const SECONDS: f64 = 0.01;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    SixteenByFour,
    EightByEight,
    F32,
}

use Arithmetic::{EightByEight, F32, SixteenByFour};

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    rows: usize,
    cols: usize,
    block: usize,
    nested: bool,
    batch: usize,
    arithmetic: Arithmetic,
    /// Matrices that are multiplied in turn.
    matrices: usize,
}

const DEFAULT: Case = Case {
    name: "",
    rows: 512,
    cols: 4096,
    block: 64,
    nested: false,
    batch: 1,
    arithmetic: SixteenByFour,
    matrices: 1,
};

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
    Case { name: "batch of 128, 72 rows", rows: 72, batch: 128, ..DEFAULT },
    Case { name: "batch of 128, 384 columns", rows: 4096, cols: 384, batch: 128, ..DEFAULT },
    Case { name: "one vector, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, ..DEFAULT },
    Case { name: "batch of 8, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, batch: 8, ..DEFAULT },
    Case { name: "batch of 128, 384 columns, blocks of 256", rows: 4096, cols: 384, block: 256, batch: 128, ..DEFAULT },
    Case { name: "f32, one vector", arithmetic: F32, ..DEFAULT },
    Case { name: "f32, one vector, 384 columns", arithmetic: F32, rows: 4096, cols: 384, ..DEFAULT },
    Case {
        name: "f32, one vector, 384 columns, blocks of 256",
        arithmetic: F32,
        rows: 4096,
        cols: 384,
        block: 256,
        ..DEFAULT
    },
    Case { name: "f32, batch of 8", arithmetic: F32, batch: 8, ..DEFAULT },
    Case { name: "f32, batch of 128", arithmetic: F32, batch: 128, ..DEFAULT },
    Case { name: "f32, batch of 128, 384 columns", arithmetic: F32, rows: 4096, cols: 384, batch: 128, ..DEFAULT },
    Case {
        name: "f32, batch of 128, 384 columns, blocks of 256",
        arithmetic: F32,
        rows: 4096,
        cols: 384,
        block: 256,
        batch: 128,
        ..DEFAULT
    },
    Case { name: "8x8, one vector", ..EIGHT },
    Case { name: "8x8, one vector, nested absmax", nested: true, ..EIGHT },
    Case { name: "8x8, one vector, 8 MB", rows: 4096, ..EIGHT },
    Case { name: "8x8, one vector, from DRAM", matrices: DRAM, ..EIGHT },
    Case { name: "8x8, batch of 2", batch: 2, ..EIGHT },
    Case { name: "8x8, batch of 4", batch: 4, ..EIGHT },
    Case { name: "8x8, batch of 8", batch: 8, ..EIGHT },
    Case { name: "8x8, batch of 16, 576 x 576", rows: 576, cols: 576, batch: 16, ..EIGHT },
    Case { name: "8x8, batch of 128", batch: 128, ..EIGHT },
    Case { name: "8x8, batch of 128, 8 MB", rows: 4096, batch: 128, ..EIGHT },
];

const EIGHT: Case = Case { arithmetic: EightByEight, ..DEFAULT };

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

/// Does a product some times, and returns the seconds and the outputs.
type Run<'a> = Box<dyn FnMut(usize) -> (f64, Vec<f32>) + 'a>;

/// A module that makes a [`Run`] with the crate of this name.
macro_rules! version {
    ($version:ident) => {
        mod $version {
            use ::$version::*;

            use super::{Arithmetic, Case, Data, Run, buffer};

            pub fn run<'a>(case: Case, data: &'a Data, isa: &str) -> Run<'a> {
                let (kernels, inputs) = (kernels(isa), &data.inputs);
                if case.arithmetic == Arithmetic::F32 {
                    return repeated(case, data, move |m, out| kernels.gemm_f32(m, inputs, out));
                }
                let block = BlockSize::new(case.block).expect("a block size");
                let values = buffer(case.batch * Activations::values_len(case.cols, block));
                let scales = buffer(case.batch * Activations::scales_len(case.cols, block));
                let x = kernels.quantize_activations_batch(inputs, case.cols, block, values, scales);
                let x = x.expect("the lengths fit");
                repeated(case, data, move |m, out| match x.batch() {
                    1 => kernels.gemv(m, &x, out),
                    _ => kernels.gemm(m, &x, out),
                })
            }

            pub fn kernels(isa: &str) -> Kernels {
                let named = |name: &str| Kernels::available().find(|kernels| kernels.isa().name() == name);
                named(isa).or_else(|| named("avx2")).expect("an instruction set of this CPU")
            }

            /// The product of each matrix in turn.
            pub fn repeated<'a>(
                case: Case,
                data: &'a Data,
                mut product: impl FnMut(&Nf4Matrix<'a>, &mut [f32]) -> Result<(), ShapeError> + 'a,
            ) -> Run<'a> {
                let block = BlockSize::new(case.block).expect("a block size");
                let nested = NestedAbsmax::new(&data.codes, &DYNAMIC_MAP, &data.nested, 0.5).expect("the lengths fit");
                let absmax = if case.nested { Absmax::Nested(nested) } else { Absmax::Plain(&data.absmax) };
                let matrix = |packed| Nf4Matrix::new(packed, absmax, case.rows, case.cols, block);
                let matrices: Vec<_> =
                    data.packed.iter().map(|packed| matrix(packed).expect("the lengths fit")).collect();
                let mut out = vec![0.0; case.rows * case.batch];
                let mut next = 0;
                Box::new(move |times| {
                    let start = super::Instant::now();
                    for _ in 0..times {
                        product(&matrices[next % matrices.len()], &mut out).expect("the lengths fit");
                        next += 1;
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

fn eight_by_eight<'a>(case: Case, data: &'a Data, isa: &str) -> Run<'a> {
    let (kernels, len) = (after::kernels(isa), ::after::Activations8x8::values_len(case.cols));
    let (values, scales) =
        (buffer(case.batch * len), buffer(case.batch * ::after::Activations8x8::scales_len(case.cols)));
    let x = kernels.quantize_activations_8x8_batch(&data.inputs, case.cols, values, scales).expect("the lengths fit");
    after::repeated(case, data, move |m, out| match x.batch() {
        1 => kernels.gemv_8x8(m, &x, out),
        _ => kernels.gemm_8x8(m, &x, out),
    })
}

/// Memory for as long as the program runs, because what is quantized into it is kept in a [`Run`].
fn buffer<T: Default + Clone>(len: usize) -> &'static mut [T] {
    vec![T::default(); len].leak()
}

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
        let after = if case.arithmetic == EightByEight { eight_by_eight } else { after::run };
        let mut versions = [before::run(case, &data, &isa), after(case, &data, &isa)];
        let [(seconds, old), (_, new)] = versions.each_mut().map(|run| run(1));
        let largest = old.iter().fold(0.0_f32, |largest, y| largest.max(y.abs()));
        let differs = |(old, new): (&f32, &f32)| match case.arithmetic {
            EightByEight => (old - new).abs() > 0.1 * largest,
            SixteenByFour | F32 => old.to_bits() != new.to_bits(),
        };
        assert!(!old.iter().zip(&new).any(differs), "{}: other results", case.name);
        let times = ((SECONDS / seconds) as usize).max(1);
        let rounds: Vec<[f64; 2]> = (0..ROUNDS).map(|_| versions.each_mut().map(|run| run(times).0)).collect();
        let work = (case.rows * case.cols * case.batch * times) as f64 / 1e9;
        let [old, new] = [0, 1].map(|v| work / median(rounds.iter().map(|round| round[v]).collect()));
        let ratio = median(rounds.iter().map(|[old, new]| old / new).collect());
        println!("| {} | {old:.1} | {new:.1} | {ratio:.2} x |", case.name);
    }
}
