//! Every operation on every instruction set of this machine.
//!
//! `cargo bench --bench kernels` runs criterion and then prints ratios: all operations are timed in turn, round by
//! round, so that what disturbs the machine disturbs all alike, and medians are compared. `-- --ratios` prints only
//! these. With `--features rayon`, two threads are timed as well as one. Throughput counts the packed bytes (codes and
//! absmax), so that it compares with memory bandwidth; `read` is the limit.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "shapes are fixed and fit")]

#[path = "../tests/support/generator.rs"]
mod generator;

use core::hint::black_box;
use core::time::Duration;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput};
use generator::Generator;
use nf4::{
    Absmax, Activations, Activations8x8, BlockSize, DYNAMIC_MAP, Float, Isa, Kernels, NestedAbsmax, Nf4Matrix, bf16,
    f16,
};

/// A toy, one that stays in the cache, and one that does not: sixteen matrices in turn, 150 MB.
const SHAPES: [Shape; 3] = [
    Shape { name: "64x1024", rows: 64, cols: 1024, matrices: 1 },
    Shape { name: "4096x4096", rows: 4096, cols: 4096, matrices: 1 },
    Shape { name: "16x4096x4096", rows: 4096, cols: 4096, matrices: 16 },
];
/// Around the size from which on two threads pay; see `src/parallel/threads.rs`.
const SMALL_SHAPES: [Shape; 6] = [
    Shape { name: "128x1024", rows: 128, cols: 1024, matrices: 1 },
    Shape { name: "256x1024", rows: 256, cols: 1024, matrices: 1 },
    Shape { name: "512x1024", rows: 512, cols: 1024, matrices: 1 },
    Shape { name: "1024x1024", rows: 1024, cols: 1024, matrices: 1 },
    Shape { name: "1024x2048", rows: 1024, cols: 2048, matrices: 1 },
    Shape { name: "2048x2048", rows: 2048, cols: 2048, matrices: 1 },
];
const BATCHES: [usize; 2] = [8, 128];
const THREADS: &[usize] = if cfg!(feature = "rayon") { &[1, 2] } else { &[1] };

struct Shape {
    name: &'static str,
    rows: usize,
    cols: usize,
    matrices: usize,
}

/// Matrices of one shape with everything that the operations need.
struct Data {
    shape: &'static Shape,
    block_size: BlockSize,
    weights: Vec<f32>,
    /// Vectors of `cols` inputs, as many as the largest batch.
    inputs: Vec<f32>,
    packed: Vec<Vec<u8>>,
    absmax: Vec<f32>,
    codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    offset: f32,
}

impl Data {
    fn new(shape: &'static Shape, block_size: BlockSize) -> Self {
        let (n, kernels) = (shape.rows * shape.cols, Kernels::detect());
        let mut generator = Generator(1);
        let mut uniform = |len| -> Vec<f32> { (0..len).map(|_| generator.uniform() - 0.5).collect() };
        let (weights, inputs) = (uniform(n), uniform(shape.cols * BATCHES[1]));
        let (mut packed, mut absmax) = (vec![0; n / 2], vec![0.0; block_size.blocks(n)]);
        kernels.quantize(&weights, block_size, &mut packed, &mut absmax).unwrap();
        let (mut codes, mut nested_absmax) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
        let offset = kernels.quantize_absmax(&absmax, &mut codes, &mut nested_absmax).unwrap();
        let packed = vec![packed; shape.matrices];
        Self { shape, block_size, weights, inputs, packed, absmax, codes, nested_absmax, offset }
    }

    /// Buffers for the quantized inputs of a batch.
    fn buffers(&self, batch: usize) -> (Vec<i16>, Vec<f32>) {
        let (cols, block_size) = (self.shape.cols, self.block_size);
        let (values, scales) = (Activations::values_len(cols, block_size), Activations::scales_len(cols, block_size));
        (vec![0; batch * values], vec![0.0; batch * scales])
    }

    fn quantize_inputs<'a>(&'a self, batch: usize, (values, scales): &'a mut (Vec<i16>, Vec<f32>)) -> Activations<'a> {
        let (inputs, cols) = (self.inputs(batch), self.shape.cols);
        Kernels::detect().quantize_activations_batch(inputs, cols, self.block_size, values, scales).unwrap()
    }

    fn inputs(&self, batch: usize) -> &[f32] {
        &self.inputs[..batch * self.shape.cols]
    }

    fn elements(&self) -> usize {
        self.shape.rows * self.shape.cols
    }

    /// Of one matrix.
    fn packed_bytes(&self) -> usize {
        self.packed[0].len() + 4 * self.absmax.len()
    }

    fn matrices(&self, nested: bool) -> Vec<Nf4Matrix<'_>> {
        let absmax = if nested {
            let parts = NestedAbsmax::new(&self.codes, &DYNAMIC_MAP, &self.nested_absmax, self.offset);
            Absmax::Nested(parts.unwrap())
        } else {
            Absmax::Plain(&self.absmax)
        };
        let Shape { rows, cols, .. } = *self.shape;
        self.packed.iter().map(|p| Nf4Matrix::new(p, absmax, rows, cols, self.block_size).unwrap()).collect()
    }
}

/// An operation, ready to run.
struct Operation<'a> {
    name: &'static str,
    isa: &'static str,
    batch: usize,
    threads: usize,
    /// Matrices that a run takes.
    matrices: usize,
    run: Box<dyn FnMut() + 'a>,
}

/// Which operations, and how.
#[derive(Clone, Copy)]
struct Setup<'a> {
    data: &'a Data,
    kernels: Kernels,
    threads: usize,
}

impl<'a> Setup<'a> {
    fn operation(self, name: &'static str, run: impl FnMut() + 'a) -> Operation<'a> {
        let isa = self.kernels.isa().name();
        Operation { name, isa, batch: 1, threads: self.threads, matrices: 1, run: Box::new(run) }
    }

    /// A product of all matrices with a batch; `run` does it for some rows.
    fn product(
        self,
        name: &'static str,
        batch: usize,
        nested: bool,
        run: impl Fn(&Nf4Matrix<'_>, &mut [f32]) + Sync + 'a,
    ) -> Operation<'a> {
        let (matrices, mut y) = (self.data.matrices(nested), vec![0.0; self.data.shape.rows * batch]);
        let count = matrices.len();
        let all = move || matrices.iter().for_each(|m| by_rows(self.threads, black_box(m), &mut y, &run));
        Operation { batch, matrices: count, ..self.operation(name, all) }
    }

    /// Inputs of the 8x8 product. They live as long as the program, because few are made.
    fn inputs_8x8(&self, batch: usize) -> Activations8x8<'a> {
        let cols = self.data.shape.cols;
        let values = vec![0; batch * Activations8x8::values_len(cols)].leak();
        let scales = vec![0.0; batch * Activations8x8::scales_len(cols)].leak();
        self.kernels.quantize_activations_8x8_batch(self.data.inputs(batch), cols, values, scales).unwrap()
    }

    fn products(self, activations: Activations<'a>) -> Vec<Operation<'a>> {
        let coarse = self.inputs_8x8(1);
        let Self { data, kernels: k, .. } = self;
        vec![
            self.product("gemv", 1, false, move |m, y| k.gemv(m, &activations, y).unwrap()),
            self.product("gemv_8x8", 1, false, move |m, y| k.gemv_8x8(m, &coarse, y).unwrap()),
            self.product("gemv_nested", 1, true, move |m, y| k.gemv(m, &activations, y).unwrap()),
            self.product("gemv_f32", 1, false, move |m, y| k.gemv_f32(m, data.inputs(1), y).unwrap()),
            self.transposed(),
        ]
    }

    fn batch_products(self, activations: Activations<'a>) -> [Operation<'a>; 3] {
        let coarse = self.inputs_8x8(activations.batch());
        let (Self { data, kernels: k, .. }, n) = (self, activations.batch());
        [
            self.product("gemm", n, false, move |m, y| k.gemm(m, &activations, y).unwrap()),
            self.product("gemm_8x8", n, false, move |m, y| k.gemm_8x8(m, &coarse, y).unwrap()),
            self.product("gemm_f32", n, false, move |m, y| k.gemm_f32(m, data.inputs(n), y).unwrap()),
        ]
    }

    /// Two threads make two sums, which are added.
    fn transposed(self) -> Operation<'a> {
        let Self { data, kernels, threads } = self;
        let (matrices, Shape { rows, cols, .. }) = (data.matrices(false), data.shape);
        let mut sums = vec![0.0_f32; threads * cols];
        let run = move || {
            for m in &matrices {
                let parts: Vec<_> = (0..threads).map(|t| t * rows / threads..(t + 1) * rows / threads).collect();
                in_parallel(sums.chunks_mut(*cols).zip(parts).collect(), |(y, rows)| {
                    kernels.gemv_transposed_f32(&m.row_range(rows.clone()).unwrap(), &data.inputs[rows], y).unwrap();
                });
                let (y, others) = sums.split_at_mut(*cols);
                others.iter().zip(black_box(y)).for_each(|(x, y)| *y += x);
            }
        };
        Operation { matrices: data.packed.len(), ..self.operation("gemv_transposed_f32", run) }
    }

    /// Conversions of one matrix.
    fn conversions(self) -> Vec<Operation<'a>> {
        let Self { data, kernels, threads } = self;
        let (mut packed, mut absmax) = (data.packed[0].clone(), data.absmax.clone());
        let blocks = data.absmax.len().div_ceil(threads);
        let elements = blocks * data.block_size.get();
        let mut operations = vec![
            self.operation("quantize", move || {
                let parts = data.weights.chunks(elements).zip(packed.chunks_mut(elements / 2));
                in_parallel(parts.zip(absmax.chunks_mut(blocks)).collect(), |((weights, packed), absmax)| {
                    kernels.quantize(black_box(weights), data.block_size, packed, absmax).unwrap();
                });
            }),
            self.dequantize::<f32>("dequantize_f32"),
            self.dequantize::<f16>("dequantize_f16"),
            self.dequantize::<bf16>("dequantize_bf16"),
        ];
        // Too small for threads.
        if threads == 1 {
            let (mut codes, mut nested) = (data.codes.clone(), data.nested_absmax.clone());
            let (mut values, mut scales) = data.buffers(1);
            operations.push(self.operation("quantize_absmax", move || {
                kernels.quantize_absmax(black_box(&data.absmax), &mut codes, &mut nested).unwrap();
            }));
            operations.push(self.lora_update());
            operations.push(self.operation("quantize_activations", move || {
                let inputs = black_box(data.inputs(1));
                kernels.quantize_activations(inputs, data.block_size, &mut values, &mut scales).unwrap();
            }));
        }
        operations
    }

    /// What a `LoRA` adapter of rank 16 adds to the product with a vector: `y += B (A x)`.
    fn lora_update(self) -> Operation<'a> {
        const RANK: usize = 16;
        let (Self { data, kernels, .. }, Shape { rows, cols, .. }) = (self, self.data.shape);
        let (a, b) = (&data.weights[..RANK * cols], &data.weights[..rows * RANK]);
        let (mut low_rank, mut y) = ([0.0; RANK], vec![0.0; *rows]);
        self.operation("lora_update", move || {
            kernels.gemv_dense(black_box(a), data.inputs(1), &mut low_rank).unwrap();
            kernels.gemv_dense_add(black_box(b), &low_rank, 2.0, &mut y).unwrap();
        })
    }

    fn dequantize<T: Float + Default>(self, name: &'static str) -> Operation<'a> {
        let (matrix, mut out) = (self.data.matrices(false)[0], vec![T::default(); self.data.elements()]);
        let run = move |m: &Nf4Matrix<'_>, out: &mut [T]| self.kernels.dequantize(m, out).unwrap();
        self.operation(name, move || by_rows(self.threads, black_box(&matrix), &mut out, &run))
    }

    /// The limits: a pure read of the bytes of all matrices, and plain stores of as many f32 as one has.
    fn limits(self) -> [Operation<'a>; 2] {
        let Self { data, threads, .. } = self;
        let read = move || {
            for packed in &data.packed {
                let halves = packed.chunks(packed.len() / threads).zip(data.absmax.chunks(data.absmax.len() / threads));
                in_parallel(halves.collect(), |(packed, absmax)| {
                    black_box((xor(packed), absmax.iter().fold(0, |sum, x| sum ^ x.to_bits())));
                });
            }
        };
        let mut stored = vec![0.0_f32; data.elements()];
        let store = move || {
            let half = stored.len() / threads;
            in_parallel(stored.chunks_mut(half).collect(), |part| part.fill(black_box(1.0)));
            black_box(&mut stored);
        };
        let read = Operation { matrices: data.packed.len(), ..self.operation("read", read) };
        [read, self.operation("store_f32", store)].map(|o| Operation { isa: "any", ..o })
    }
}

/// Runs `run` on all rows, on two threads in two halves.
fn by_rows<T: Send>(
    threads: usize,
    m: &Nf4Matrix<'_>,
    out: &mut [T],
    run: &(impl Fn(&Nf4Matrix<'_>, &mut [T]) + Sync),
) {
    let (rows, per_row) = (m.rows().div_ceil(threads), out.len() / m.rows());
    let starts = (0..m.rows()).step_by(rows);
    in_parallel(starts.zip(out.chunks_mut(rows * per_row)).collect(), |(start, out)| {
        run(&m.row_range(start..start + out.len() / per_row).unwrap(), out);
    });
}

/// One part here, two on two threads.
fn in_parallel<P: Send>(mut parts: Vec<P>, run: impl Fn(P) + Sync) {
    match (parts.pop(), parts.pop()) {
        #[cfg(feature = "rayon")]
        (Some(second), Some(first)) => {
            rayon::join(|| run(first), || run(second));
        }
        (part, _) => part.into_iter().for_each(run),
    }
}

fn xor(bytes: &[u8]) -> [u64; 16] {
    bytes.as_chunks::<128>().0.iter().fold([0; 16], |mut sums, chunk| {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
        sums
    })
}

/// Runs `use_operations` with every operation of a shape. All instruction sets share the quantized inputs: they would
/// make the same bits.
fn with_operations(data: &Data, use_operations: impl FnOnce(Vec<Operation<'_>>)) {
    let mut buffers = [1, BATCHES[0], BATCHES[1]].map(|n| (n, data.buffers(n)));
    let activations = buffers.each_mut().map(|(n, buffers)| data.quantize_inputs(*n, buffers));
    check(data, &activations);
    let mut operations = Vec::new();
    for &threads in THREADS {
        for kernels in Kernels::available() {
            let setup = Setup { data, kernels, threads };
            operations.extend(setup.products(activations[0]));
            // Seconds each with portable code.
            let portable = kernels.isa() == Isa::Scalar && data.elements() > 1 << 20;
            if data.shape.matrices == 1 && !portable {
                operations.extend(activations[1..].iter().flat_map(|a| setup.batch_products(*a)));
            }
            if data.shape.matrices == 1 {
                operations.extend(setup.conversions());
            }
        }
        operations.extend(Setup { data, kernels: Kernels::detect(), threads }.limits());
    }
    use_operations(operations);
}

/// Instruction sets agree, so that what is timed is right.
fn check(data: &Data, activations: &[Activations<'_>; 3]) {
    let matrix = data.matrices(true)[0].row_range(0..64).unwrap();
    let outputs = |k: Kernels| {
        let mut y = vec![0.0; 64 * BATCHES[0]];
        k.gemm(&matrix, &activations[1], &mut y).unwrap();
        let mut single = vec![0.0; 64];
        k.gemv_f32(&matrix, data.inputs(1), &mut single).unwrap();
        y.into_iter().chain(single).map(f32::to_bits).collect::<Vec<_>>()
    };
    let expected = outputs(Kernels::scalar());
    assert!(expected.iter().any(|bits| *bits != 0), "all products are 0");
    Kernels::available().for_each(|k| assert!(outputs(k) == expected, "{} has other bits", k.isa()));
}

/// Criterion, with ids such as `gemv/avx2/4096x4096/b64`, and `/n8` for a batch, `/t2` for two threads.
fn criterion(c: &mut Criterion) {
    for shape in &SHAPES {
        for block_size in [BlockSize::B64, BlockSize::B32, BlockSize::B256] {
            if block_size != BlockSize::B64 && shape.matrices > 1 {
                continue;
            }
            let data = Data::new(shape, block_size);
            with_operations(&data, |operations| {
                for mut o in operations {
                    let mut parameter = format!("{}/b{}", shape.name, block_size.get());
                    for (letter, number) in [('n', o.batch), ('t', o.threads)] {
                        if number > 1 {
                            parameter += &format!("/{letter}{number}");
                        }
                    }
                    let mut group = c.benchmark_group(o.name);
                    group.sample_size(10).measurement_time(Duration::from_secs(1));
                    group.warm_up_time(Duration::from_millis(300));
                    group.throughput(Throughput::Bytes((o.matrices * data.packed_bytes()) as u64));
                    group.bench_function(BenchmarkId::new(o.isa, parameter), |b| b.iter(&mut o.run));
                }
            });
        }
    }
}

/// Median nanoseconds for what one matrix and one vector take, of all operations, timed in turn.
fn medians(operations: &mut [Operation<'_>], rounds: usize) -> Vec<f64> {
    let mut times = vec![Vec::with_capacity(rounds); operations.len()];
    for _ in 0..rounds {
        for (o, times) in operations.iter_mut().zip(&mut times) {
            // Twice untimed: the one before may have filled the cache with its own data.
            (0..2).for_each(|_| (o.run)());
            let start = Instant::now();
            (o.run)();
            times.push(start.elapsed().as_nanos() as f64);
        }
    }
    let median = |(o, mut times): (&Operation<'_>, Vec<f64>)| {
        times.sort_unstable_by(f64::total_cmp);
        times[rounds / 2] / (o.matrices * o.batch) as f64
    };
    operations.iter().zip(times).map(median).collect()
}

/// Medians in GMAC/s (conversions: billions of weights per second) and as ratios.
fn ratios() {
    const ROUNDS: usize = 15;
    for shape in &SHAPES[1..] {
        let data = Data::new(shape, BlockSize::B64);
        with_operations(&data, |mut operations| {
            operations.retain(|o| o.isa != "scalar" || shape.matrices == 1);
            let medians = medians(&mut operations, ROUNDS);
            print_ratios(&data, &operations, &medians, ROUNDS);
        });
    }
}

/// From which size on two threads pay.
fn thresholds() {
    const ROUNDS: usize = 101;
    for shape in &SMALL_SHAPES {
        let data = Data::new(shape, BlockSize::B64);
        with_operations(&data, |mut operations| {
            operations.retain(|o| o.isa == Kernels::detect().isa().name() && o.batch == 1);
            let medians = medians(&mut operations, ROUNDS);
            println!("\n{} (2^{} weights), medians of {ROUNDS} rounds", shape.name, data.elements().ilog2());
            for (two, time) in operations.iter().zip(&medians).filter(|(o, _)| o.threads == 2) {
                let one = operations.iter().zip(&medians).find(|(o, _)| o.name == two.name).unwrap().1;
                println!("{:22} {:7.1} us, on two threads x {:.2}", two.name, one / 1e3, one / time);
            }
        });
    }
}

fn print_ratios(data: &Data, operations: &[Operation<'_>], medians: &[f64], rounds: usize) {
    println!("\n{}, block {}, medians of {rounds} rounds", data.shape.name, data.block_size.get());
    let columns = ["GMAC/s", "GB/s", "share of read", "x f32 GEMV", "x GEMV", "% of GEMV", "x scalar", "x 1 thread"];
    println!("{:31}{}", "", columns.map(|c| format!("{c:>14}")).concat());
    for (o, time) in operations.iter().zip(medians) {
        // How many times as fast as another one.
        let ratio = |name: &str, isa: &str, batch: usize, threads: usize| {
            let same = |p: &Operation<'_>| p.name == name && p.isa == isa && p.batch == batch && p.threads == threads;
            operations.iter().position(same).map_or(String::new(), |i| format!("{:.2}", medians[i] / time))
        };
        let mut name = format!("{} {}", o.name, o.isa);
        for (what, number) in [("n", o.batch), ("t", o.threads)] {
            if number > 1 {
                name += &format!(" {what}{number}");
            }
        }
        let single = if o.name.ends_with("f32") { "gemv_f32" } else { "gemv" };
        let gemv = operations.iter().position(|p| p.name == "gemv" && p.isa == o.isa && p.threads == o.threads);
        let percent_of_gemv = match (o.name, gemv) {
            ("lora_update" | "quantize_activations", Some(gemv)) => format!("{:.2}", 100.0 * time / medians[gemv]),
            _ => String::new(),
        };
        let cells = [
            format!("{:.2}", data.elements() as f64 / time),
            if o.batch == 1 { format!("{:.2}", data.packed_bytes() as f64 / time) } else { String::new() },
            if o.batch == 1 { ratio("read", "any", 1, o.threads) } else { String::new() },
            ratio("gemv_f32", o.isa, 1, o.threads),
            if o.batch > 1 { ratio(single, o.isa, 1, o.threads) } else { String::new() },
            percent_of_gemv,
            ratio(o.name, "scalar", o.batch, o.threads),
            if o.threads > 1 { ratio(o.name, o.isa, o.batch, 1) } else { String::new() },
        ];
        println!("{name:31}{}", cells.map(|c| format!("{c:>14}")).concat());
    }
}

fn main() {
    if !std::env::args().any(|a| a == "--ratios") {
        let mut c = Criterion::default().configure_from_args();
        criterion(&mut c);
        c.final_summary();
    }
    // `cargo test --benches` runs this too, without that argument: there it only shows that everything runs.
    if std::env::args().any(|a| a == "--bench") {
        ratios();
        if cfg!(feature = "rayon") {
            thresholds();
        }
    }
}
