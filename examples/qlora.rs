//! A `QLoRA` layer on real weights: quantize, add an adapter, multiply, merge; then the speed at a size that matters.
//!
//!     cargo run --release --example qlora
//!
//! Weight and activations are those of the first query projection of all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0).
//! The program fails if two instruction sets disagree in a bit, or if the merged layer does not agree.

use core::error::Error;
use core::hint::black_box;
use core::time::Duration;
use std::time::Instant;

use nf4::checkpoint::{CheckpointError, FloatType, TensorFile, TensorSource};
use nf4::{Absmax, Activations, Activations8x8, BlockSize, Kernels, LoRALayer, QLoRALayer, Quantized4Bit, Tensor};

const RANK: usize = 16;
const ALPHA: f32 = 32.0;

fn main() -> Result<(), Box<dyn Error>> {
    real_layer()?;
    println!();
    large_matrices()
}

/// The main job: a real layer with an adapter, with and without double quantization.
fn real_layer() -> Result<(), Box<dyn Error>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/reference/minilm/layer0_query.safetensors");
    let file = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let file = TensorFile::parse(&file)?;
    let Some(&[d_out, d_in]) = file.info("weight").map(|info| info.shape.as_slice()) else {
        return Err(format!("{path}: `weight` is not a matrix").into());
    };
    let values = |name| Ok::<_, CheckpointError>(FloatType::F32.values(&file.read(name)?));
    let (weight, x) = (values("weight")?, values("x")?);
    let inputs: Vec<Tensor> = x.chunks(d_in).map(|x| Tensor::from_vec(x.to_vec(), false)).collect();

    // Training would fill B; here it gets small random values, so that the adapter counts.
    let mut dense = LoRALayer::try_new(Tensor::from_vec(weight, false), d_out, d_in, RANK, ALPHA)?;
    dense.lora_b_mut().data_mut().copy_from_slice(&normal(d_out * RANK, 0.02));
    let plain = QLoRALayer::try_from_lora(dense.clone())?;
    let nested = QLoRALayer::try_from_lora_double_quant(dense.clone())?;

    println!(
        "all-MiniLM-L6-v2, first query projection: {d_out} x {d_in}, {} real activations, rank {RANK}",
        inputs.len()
    );
    println!();
    println!("                      base bytes   bits/weight   adapter bytes   error against f32");
    let f32_bytes = d_out * d_in * 4;
    println!("f32                   {f32_bytes:>10}{:>14.3}{:>16}", 32.0, plain.memory_stats().lora_bytes);
    let expected = outputs(&inputs, |x| dense.forward(x));
    for (name, layer) in [("NF4, block 64", &plain), ("NF4, double quant", &nested)] {
        let (stats, bits) = (layer.memory_stats(), layer.base_weight_quantized().bits_per_weight());
        let error = relative_error(&outputs(&inputs, |x| layer.forward(x)), &expected);
        let (base, lora) = (stats.base_quantized_bytes, stats.lora_bytes);
        println!("{name:<22}{base:>10}{bits:>14.3}{lora:>16}{:>18.2} %", error * 100.0);
    }

    println!();
    println!("time a forward        NF4   double quant   dense f32 (base only)   same bits");
    for kernels in Kernels::available() {
        let (mut times, mut same) = (Vec::new(), true);
        for layer in [&plain, &nested] {
            let expected = outputs(&inputs, |x| layer.forward(x));
            let layer = layer.clone().with_kernels(kernels);
            let got = outputs(&inputs, |x| layer.forward(x));
            same &= same_bits(&got, &expected);
            let (mut scratch, mut y) = (layer.scratch(1), vec![0.0; d_out]);
            times.push(median_ns(|| layer.forward_into(black_box(inputs[0].data()), &mut scratch, &mut y))?);
        }
        let mut y = vec![0.0; d_out];
        let weight = dense.base_weight().data();
        times.push(median_ns(|| kernels.gemv_dense(weight, black_box(inputs[0].data()), &mut y))?);
        let [plain, nested, dense] = [times[0], times[1], times[2]].map(|ns| ns / 1e3);
        let (isa, yes) = (kernels.isa(), yes_or_no(same));
        println!("{isa:<16}{plain:>6.1} us{nested:>12.1} us{dense:>21.1} us{yes:>12}");
        if !same {
            return Err(format!("{isa} gives other bits than {}", Kernels::detect().isa()).into());
        }
    }

    // The merged weight is dense: a layer without an adapter.
    println!();
    for (name, layer) in [("NF4, block 64", &plain), ("NF4, double quant", &nested)] {
        let merged = layer.merge_to_f32();
        let merged = outputs(&inputs, |x| {
            let mut y = Tensor::zeros(d_out, false);
            layer.kernels().gemv_dense(&merged, x.data(), y.data_mut()).expect("merged is [d_out, d_in]");
            y
        });
        let error = relative_error(&outputs(&inputs, |x| layer.forward(x)), &merged);
        println!("merged, {name:<20} its dense f32 product and the forward differ by {error:.1e} of the output's rms");
        if error > 1e-3 {
            return Err("the merged layer does not agree".into());
        }
    }
    Ok(())
}

/// The base product at the size of a layer of a large model. Eight matrices are multiplied in turn, as the layers of a model
/// are, so that their bytes come from memory and not from a cache.
fn large_matrices() -> Result<(), Box<dyn Error>> {
    const N: usize = 4096;
    const BLOCK: BlockSize = BlockSize::B64;
    let (weights, x) = (normal(N * N, 0.02), normal(N, 1.0));
    println!("{N} x {N} normal weights, 8 matrices in turn, one thread");
    println!();
    println!("                                  a product       GMAC/s   GB/s packed   of a pure read   same bits");
    for (name, double_quant) in [("block 64", false), ("double quant", true)] {
        let matrices = vec![Quantized4Bit::quantize(&weights, N, N, BLOCK, double_quant)?; 8];
        let mut turn = matrices.iter().cycle();
        let mut next = || black_box(turn.next().expect("cycles"));
        let bytes = matrices[0].memory_bytes() as f64;
        let read_ns = median_ns(|| Ok::<_, nf4::Error>(read_all(next())))?;
        let mut expected: [Option<Vec<f32>>; 2] = [None, None];
        for kernels in Kernels::available() {
            let mut values = vec![0; Activations::values_len(N, BLOCK)];
            let mut scales = vec![0.0; Activations::scales_len(N, BLOCK)];
            let mut bytes_8x8 = vec![0; Activations8x8::values_len(N)];
            let mut scales_8x8 = vec![0.0; Activations8x8::scales_len(N)];
            let mut y = [vec![0.0; N], vec![0.0; N]];
            let ns = [
                median_ns(|| {
                    let x = kernels.quantize_activations(black_box(&x), BLOCK, &mut values, &mut scales)?;
                    kernels.gemv(&next().view(), &x, &mut y[0])
                })?,
                median_ns(|| {
                    let x = kernels.quantize_activations_8x8(black_box(&x), &mut bytes_8x8, &mut scales_8x8)?;
                    kernels.gemv_8x8(&next().view(), &x, &mut y[1])
                })?,
            ];
            for (((arithmetic, ns), y), expected) in ["16x4", "8x8"].into_iter().zip(ns).zip(&y).zip(&mut expected) {
                let same = same_bits(y, expected.get_or_insert_with(|| y.clone()));
                let (isa, ms, yes) = (kernels.isa(), ns / 1e6, yes_or_no(same));
                let (speed, rate, share) = ((N * N) as f64 / ns, bytes / ns, read_ns / ns * 100.0);
                println!(
                    "{isa:<13}{name:<13}{arithmetic:<5}{ms:>9.2} ms{speed:>13.1}{rate:>14.2}{share:>15.1} %{yes:>12}"
                );
                if !same {
                    return Err(format!("{isa} gives other bits than {}", Kernels::detect().isa()).into());
                }
            }
        }
        let (ms, rate) = (read_ns / 1e6, bytes / read_ns);
        println!("{:<13}{name:<18}{ms:>9.2} ms{rate:>27.2}", "read");
    }
    let mut y = vec![0.0; N];
    let ns = median_ns(|| Kernels::detect().gemv_dense(&weights, black_box(&x), &mut y))?;
    println!("{:<31}{:>9.2} ms{:>13.1}", "dense f32", ns / 1e6, (N * N) as f64 / ns);
    Ok(())
}

fn outputs(inputs: &[Tensor], forward: impl Fn(&Tensor) -> Tensor) -> Vec<f32> {
    inputs.iter().flat_map(|x| forward(x).into_vec()).collect()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn yes_or_no(holds: bool) -> &'static str {
    if holds { "yes" } else { "NO" }
}

/// Root mean square of the difference, relative to that of what was expected.
fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = squares(&mut got.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut expected.iter().map(|v| f64::from(*v)))).sqrt()
}

/// Normal values (Box-Muller on a linear congruential generator): the same on each run.
fn normal(len: usize, sigma: f32) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 + 0.5) / 16_777_216.0
    };
    let mut value = || sigma * (-2.0 * uniform().ln()).sqrt() * (core::f32::consts::TAU * uniform()).cos();
    (0..len).map(|_| value()).collect()
}

/// The cheapest thing that touches every byte of a matrix.
fn read_all(base: &Quantized4Bit) -> u64 {
    let sum = |bytes: &[u8]| {
        let mut lanes = [0_u64; 8];
        for chunk in bytes.as_chunks::<64>().0 {
            for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks().0) {
                *lane = lane.wrapping_add(u64::from_ne_bytes(*word));
            }
        }
        lanes.iter().fold(0, |a: u64, b| a.wrapping_add(*b))
    };
    let absmax = match base.absmax().view() {
        Absmax::Plain(absmax) => absmax.iter().fold(0, |a: u64, b| a.wrapping_add(u64::from(b.to_bits()))),
        Absmax::Nested(nested) => sum(nested.codes()),
        _ => 0,
    };
    sum(base.packed()).wrapping_add(absmax)
}

/// Median time of a call, over half a second or a little more.
fn median_ns<T, E>(mut call: impl FnMut() -> Result<T, E>) -> Result<f64, E> {
    let mut time = |calls: u32| -> Result<Duration, E> {
        let start = Instant::now();
        for _ in 0..calls {
            black_box(call()?);
        }
        Ok(start.elapsed())
    };
    let mut calls = 1;
    while time(calls)? < Duration::from_micros(200) {
        calls *= 2;
    }
    let (start, mut samples) = (Instant::now(), Vec::new());
    while samples.len() < 5 || start.elapsed() < Duration::from_millis(500) {
        samples.push(time(calls)?.as_nanos() as f64 / f64::from(calls));
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}
