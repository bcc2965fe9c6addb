//! Every operation on every instruction set of this machine.
//!
//! `cargo bench --bench kernels` runs criterion and then prints ratios: all operations are timed in turn, round by round, so
//! that what disturbs the machine disturbs all alike, and medians are compared. `-- --ratios` prints only these. Throughput
//! counts the packed bytes (codes and absmax), so that it compares with memory bandwidth; `read` is the limit.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "shapes are fixed and fit")]

use core::hint::black_box;
use core::time::Duration;
use std::time::Instant;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use nf4::{Absmax, Activations, BlockSize, DYNAMIC_MAP, Kernels, NestedAbsmax, Nf4Matrix, bf16, f16};

/// A toy, one that stays in the cache, and one that does not: sixteen matrices in turn, 150 MB.
const SHAPES: [Shape; 3] = [
    Shape { name: "64x1024", rows: 64, cols: 1024, matrices: 1 },
    Shape { name: "4096x4096", rows: 4096, cols: 4096, matrices: 1 },
    Shape { name: "16x4096x4096", rows: 4096, cols: 4096, matrices: 16 },
];

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
        let mut state = 1_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let weights: Vec<f32> = (0..n).map(|_| uniform()).collect();
        let inputs: Vec<f32> = (0..shape.cols).map(|_| uniform()).collect();
        let (mut packed, mut absmax) = (vec![0; n / 2], vec![0.0; block_size.blocks(n)]);
        kernels.quantize(&weights, block_size, &mut packed, &mut absmax).unwrap();
        let (mut codes, mut nested_absmax) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
        let offset = kernels.quantize_absmax(&absmax, &mut codes, &mut nested_absmax).unwrap();
        let packed = vec![packed; shape.matrices];
        Self { shape, block_size, weights, inputs, packed, absmax, codes, nested_absmax, offset }
    }

    /// Buffers for the quantized inputs.
    fn buffers(&self) -> (Vec<i16>, Vec<f32>) {
        let (cols, block_size) = (self.shape.cols, self.block_size);
        let scales = Activations::scales_len(cols, block_size);
        (vec![0; Activations::values_len(cols, block_size)], vec![0.0; scales])
    }

    fn quantize_inputs<'a>(&'a self, (values, scales): &'a mut (Vec<i16>, Vec<f32>)) -> Activations<'a> {
        Kernels::detect().quantize_activations(&self.inputs, self.block_size, values, scales).unwrap()
    }

    fn packed_bytes(&self) -> u64 {
        (self.packed.len() * (self.packed[0].len() + 4 * self.absmax.len())) as u64
    }

    fn elements(&self) -> f64 {
        (self.packed.len() * self.weights.len()) as f64
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

/// An operation ready to run over all matrices of its data.
struct Operation<'a> {
    name: String,
    isa: &'static str,
    run: Box<dyn FnMut() + 'a>,
}

/// The products. All instruction sets share the quantized inputs: they would make the same bits.
fn products<'a>(data: &'a Data, activations: Activations<'a>, kernels: Kernels) -> Vec<Operation<'a>> {
    let isa = kernels.isa().name();
    let gemv = |nested| -> Box<dyn FnMut() + 'a> {
        let (matrices, mut y) = (data.matrices(nested), vec![0.0; data.shape.rows]);
        Box::new(move || matrices.iter().for_each(|m| kernels.gemv(black_box(m), &activations, &mut y).unwrap()))
    };
    let (matrices, mut y) = (data.matrices(false), vec![0.0; data.shape.rows]);
    let gemv_f32 =
        Box::new(move || matrices.iter().for_each(|m| kernels.gemv_f32(black_box(m), &data.inputs, &mut y).unwrap()));
    vec![
        Operation { name: "gemv".into(), isa, run: gemv(false) },
        Operation { name: "gemv_nested".into(), isa, run: gemv(true) },
        Operation { name: "gemv_f32".into(), isa, run: gemv_f32 },
    ]
}

/// A pure read of the bytes that a product reads.
fn read(data: &Data) -> Operation<'_> {
    let run = || {
        for packed in &data.packed {
            black_box(xor(packed));
        }
        black_box(xor_f32(&data.absmax));
    };
    Operation { name: "read".into(), isa: "any", run: Box::new(run) }
}

fn xor(bytes: &[u8]) -> [u64; 16] {
    bytes.as_chunks::<128>().0.iter().fold([0; 16], |mut sums, chunk| {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum ^= u64::from_le_bytes(*word);
        }
        sums
    })
}

fn xor_f32(values: &[f32]) -> u32 {
    values.iter().fold(0, |sum, x| sum ^ x.to_bits())
}

/// Conversions of one matrix.
fn conversions<'a>(data: &'a Data, kernels: Kernels) -> Vec<Operation<'a>> {
    let (isa, n) = (kernels.isa().name(), data.weights.len());
    let matrix = data.matrices(false)[0];
    let (mut packed, mut absmax) = (data.packed[0].clone(), data.absmax.clone());
    let quantize = Box::new(move || {
        kernels.quantize(black_box(&data.weights), data.block_size, &mut packed, &mut absmax).unwrap()
    });
    let (mut codes, mut nested) = (data.codes.clone(), data.nested_absmax.clone());
    let double = Box::new(move || {
        kernels.quantize_absmax(black_box(&data.absmax), &mut codes, &mut nested).unwrap();
    });
    let (mut values, mut scales) = data.buffers();
    let activations = Box::new(move || {
        let inputs = black_box(&data.inputs);
        kernels.quantize_activations(inputs, data.block_size, &mut values, &mut scales).unwrap();
    });
    let (mut f32s, mut f16s, mut bf16s) = (vec![0.0_f32; n], vec![f16::ZERO; n], vec![bf16::ZERO; n]);
    let mut stored = vec![0.0_f32; n];
    vec![
        Operation { name: "quantize".into(), isa, run: quantize },
        Operation { name: "quantize_absmax".into(), isa, run: double },
        Operation { name: "quantize_activations".into(), isa, run: activations },
        Operation {
            name: "dequantize_f32".into(),
            isa,
            run: Box::new(move || kernels.dequantize(black_box(&matrix), &mut f32s).unwrap()),
        },
        Operation {
            name: "dequantize_f16".into(),
            isa,
            run: Box::new(move || kernels.dequantize(black_box(&matrix), &mut f16s).unwrap()),
        },
        Operation {
            name: "dequantize_bf16".into(),
            isa,
            run: Box::new(move || kernels.dequantize(black_box(&matrix), &mut bf16s).unwrap()),
        },
        Operation {
            name: "store_f32".into(),
            isa: "any",
            run: Box::new(move || {
                stored.fill(black_box(1.0));
                black_box(&mut stored);
            }),
        },
    ]
}

fn operations<'a>(data: &'a Data, activations: Activations<'a>, kernels: Kernels) -> Vec<Operation<'a>> {
    let mut operations = products(data, activations, kernels);
    if data.shape.matrices == 1 {
        operations.extend(conversions(data, kernels).into_iter().filter(|o| o.isa != "any"));
    }
    operations
}

/// Criterion, with ids such as `gemv/avx2/4096x4096/b64`.
fn criterion(c: &mut Criterion) {
    for shape in &SHAPES {
        for block_size in [BlockSize::B64, BlockSize::B32, BlockSize::B256] {
            if block_size != BlockSize::B64 && shape.matrices > 1 {
                continue;
            }
            let data = Data::new(shape, block_size);
            let mut buffers = data.buffers();
            let activations = data.quantize_inputs(&mut buffers);
            let bench = |group: &mut BenchmarkGroup<'_, WallTime>, o: &mut Operation<'_>| {
                let id = BenchmarkId::new(o.isa, format!("{}/b{}", shape.name, block_size.get()));
                group.bench_function(id, |b| b.iter(&mut o.run));
            };
            for mut o in Kernels::available().flat_map(|k| operations(&data, activations, k)).chain([read(&data)]) {
                let mut group = c.benchmark_group(&o.name);
                group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
                bench(group.throughput(Throughput::Bytes(data.packed_bytes())), &mut o);
            }
        }
    }
}

/// Medians of all operations, timed in turn, as weights/ns and as shares of the limit.
fn ratios() {
    const ROUNDS: usize = 15;
    for shape in &SHAPES[1..] {
        let data = Data::new(shape, BlockSize::B64);
        let mut buffers = data.buffers();
        let activations = data.quantize_inputs(&mut buffers);
        let mut operations: Vec<_> = Kernels::available().flat_map(|k| products(&data, activations, k)).collect();
        operations.push(read(&data));
        if shape.matrices > 1 {
            operations.retain(|o| o.isa != "scalar");
        } else {
            operations.extend(conversions(&data, Kernels::detect()));
        }
        let mut times = vec![Vec::with_capacity(ROUNDS); operations.len()];
        for _ in 0..ROUNDS {
            for (o, times) in operations.iter_mut().zip(&mut times) {
                // Once untimed: the one before may have filled the cache with its own data.
                (o.run)();
                let start = Instant::now();
                (o.run)();
                times.push(start.elapsed());
            }
        }
        let medians: Vec<f64> = times
            .into_iter()
            .map(|mut t| {
                t.sort_unstable();
                t[ROUNDS / 2].as_nanos() as f64
            })
            .collect();
        let time =
            |name: &str, isa: &str| operations.iter().position(|o| o.name == name && o.isa == isa).map(|i| medians[i]);
        println!("\n{}, block 64, one thread, medians of {ROUNDS} rounds", shape.name);
        println!(
            "{:22} {:7} {:>11} {:>8} {:>14} {:>13} {:>12}",
            "", "", "weights/ns", "GB/s", "share of read", "x own f32", "x scalar"
        );
        let ratio = |x: Option<f64>, t: f64| x.map_or(String::new(), |x| format!("{:.2}", x / t));
        for (o, t) in operations.iter().zip(&medians) {
            let (own_f32, scalar) = (time("gemv_f32", o.isa), time(&o.name, "scalar"));
            println!(
                "{:22} {:7} {:>11.2} {:>8.2} {:>14} {:>13} {:>12}",
                o.name,
                o.isa,
                data.elements() / t,
                data.packed_bytes() as f64 / t,
                ratio(time("read", "any"), *t),
                ratio(own_f32, *t),
                ratio(scalar, *t),
            );
        }
    }
}

fn main() {
    if !std::env::args().any(|a| a == "--ratios") {
        let mut c = Criterion::default().configure_from_args();
        criterion(&mut c);
        c.final_summary();
    }
    // `cargo test --benches` runs this too: there it only shows that everything runs.
    if !std::env::args().any(|a| a == "--test") {
        ratios();
    }
}
