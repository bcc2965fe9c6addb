//! Fine-tunes a `QLoRA` adapter on a real matrix: the weight is held in NF4, the adapter learns what a changed weight
//! does differently, and is merged in the end.
//!
//!     cargo run --release --example finetune [SEED]
//!
//! The weight is the first query projection of all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), with activations
//! that the model feeds to it. The changed weight, which training sees through its outputs only, is that weight plus
//! a matrix of rank 4 plus noise. The same seed gives the same bits on each machine. The program fails if the loss
//! does not go down, or if the adapter does not bring outputs for inputs that it was not trained on closer to those
//! of the changed weight.

use core::error::Error;
use std::time::Instant;

use nf4::checkpoint::{CheckpointError, FloatType, TensorFile, TensorSource};
use nf4::optim::AdamW;
use nf4::{Arithmetic, BlockSize, Kernels, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor};

const RANK: usize = 8;
const ALPHA: f64 = 16.0;
const STEPS: usize = 600;
const BATCH: usize = 32;
const LEARNING_RATE: f64 = 2e-3;

fn main() -> Result<(), Box<dyn Error>> {
    let seed = std::env::args().nth(1).map_or(Ok(1), |seed| seed.parse())?;
    let mut random = Random(seed);

    // The task: a real weight, a change of it, and inputs.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/reference/minilm/layer0_query.safetensors");
    let file = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    let file = TensorFile::parse(&file)?;
    let Some(&[d_out, d_in]) = file.info("weight").map(|info| info.shape.as_slice()) else {
        return Err(format!("{path}: `weight` is not a matrix").into());
    };
    let values = |name| Ok::<_, CheckpointError>(FloatType::F32.values(&file.read(name)?));
    let (weight, real) = (values("weight")?, values("x")?);
    let changed = change(&weight, d_out, d_in, &mut random);
    let held_out = mixtures(&real, d_in, 256, &mut random);

    // The layer: the weight in NF4 with double quantization, and a fresh adapter. Training wants the f32 forward,
    // whose exact gradients a backward gives; the 16x4 forward is for afterwards.
    let base = Quantized4Bit::quantize(&weight, d_out, d_in, BlockSize::B64, true)?;
    let adapter = LoRAAdapter::new(d_out, d_in, RANK, ALPHA, LoRAScaling::Standard, seed)?;
    let mut layer = QLoRALayer::from_parts(base, adapter)?.with_arithmetic(Arithmetic::F32);
    let stats = layer.memory_stats();
    println!("all-MiniLM-L6-v2, first query projection, {d_out} x {d_in}, on {}", layer.kernels().isa());
    println!("NF4 base: {} bytes for {} in f32", stats.base_quantized_bytes, stats.base_unquantized_bytes);
    println!(
        "adapter:  rank {RANK}, {} bytes, trained with {STEPS} AdamW steps on batches of {BATCH}",
        stats.lora_bytes
    );
    println!();
    let inputs = [&real, &held_out].map(|x| Tensor::from_vec(x.clone(), false));
    let expected = [dense_outputs(&changed, &real, d_in)?, dense_outputs(&changed, &held_out, d_in)?];
    let errors = |got: [Vec<f32>; 2]| [0, 1].map(|i| relative_error(&got[i], &expected[i]));
    let before = errors(inputs.each_ref().map(|x| layer.forward(x).into_vec()));

    // Training. Nothing in a step allocates but the list of parameters.
    let mut optimizer = AdamW::new(LEARNING_RATE);
    let (mut scratch, mut backward_scratch) = (layer.scratch(BATCH), layer.backward_scratch(BATCH));
    let (mut y, mut dy) = (vec![0.0; BATCH * d_out], vec![0.0; BATCH * d_out]);
    let mut losses = Vec::with_capacity(STEPS);
    let start = Instant::now();
    for step in 0..STEPS {
        let x = mixtures(&real, d_in, BATCH, &mut random);
        let target = dense_outputs(&changed, &x, d_in)?;
        layer.forward_into(&x, &mut scratch, &mut y)?;
        let loss = loss_and_gradient(&y, &target, &mut dy);
        losses.push(loss);

        layer.zero_grad();
        layer.backward_into(&x, &dy, &mut backward_scratch, None)?;
        optimizer.lr = LEARNING_RATE * (1.0 - step as f64 / STEPS as f64);
        optimizer.step(layer.trainable_params())?;

        if (step + 1) % (STEPS / 10) == 0 {
            println!("step {:>4} of {STEPS}: loss {loss:.5}", step + 1);
        }
    }
    println!("{STEPS} steps in {:.1} s", start.elapsed().as_secs_f64());
    println!();
    plot(&losses);

    // What it brought. Serving uses the 16x4 forward; merging gives a dense weight without an adapter.
    let layer = layer.with_arithmetic(Arithmetic::SixteenByFour);
    let after = errors(inputs.each_ref().map(|x| layer.forward(x).into_vec()));
    let merged = layer.merge_to_f32();
    let merged = errors([dense_outputs(&merged, &real, d_in)?, dense_outputs(&merged, &held_out, d_in)?]);
    println!();
    println!("error against the outputs of the changed weight    real activations   held-out mixtures");
    let rows = [("before: NF4 base alone", before), ("after: base and adapter", after), ("after: merged", merged)];
    for (name, [real, held_out]) in rows {
        println!("{name:<48}{:>17.2} %{:>18.2} %", real * 100.0, held_out * 100.0);
    }

    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..STEPS / 20]), mean(&losses[STEPS - STEPS / 20..]));
    if last.is_nan() || last > 0.5 * first {
        return Err(format!("the loss did not go down: {first} at first, {last} at last").into());
    }
    if after[1] > 0.7 * before[1] || (merged[1] - after[1]).abs() > 1e-3 {
        return Err("the adapter does not do what it was trained for".into());
    }
    Ok(())
}

/// The weight that is to be learned: a change of rank 4 with a quarter of the weight's norm, and noise of 2 % on each
/// value, which no adapter of a small rank can learn.
fn change(weight: &[f32], d_out: usize, d_in: usize, random: &mut Random) -> Vec<f32> {
    const RANK: usize = 4;
    let (left, right) = (random.normal(d_out * RANK), random.normal(RANK * d_in));
    let rms = (weight.iter().map(|w| w * w).sum::<f32>() / weight.len() as f32).sqrt();
    let (low_rank, noise) = (0.25 * rms / (RANK as f32).sqrt(), random.normal(weight.len()));
    let product = |i: usize| (0..RANK).map(|k| left[i / d_in * RANK + k] * right[k * d_in + i % d_in]).sum::<f32>();
    weight.iter().zip(noise).enumerate().map(|(i, (w, n))| w + low_rank * product(i) + 0.02 * rms * n).collect()
}

/// More inputs, made of the real ones: two of them in a random mixture, and jitter of a third of their root mean
/// square.
fn mixtures(real: &[f32], d_in: usize, count: usize, random: &mut Random) -> Vec<f32> {
    let rms = (real.iter().map(|x| x * x).sum::<f32>() / real.len() as f32).sqrt();
    let rows: Vec<&[f32]> = real.chunks_exact(d_in).collect();
    let mut mixtures = Vec::with_capacity(count * d_in);
    for _ in 0..count {
        let [a, b] = [(); 2].map(|()| rows[random.index(rows.len())]);
        let (share, jitter) = (random.uniform(), random.normal(d_in));
        let values = a.iter().zip(b).zip(jitter);
        mixtures.extend(values.map(|((a, b), j)| share * a + (1.0 - share) * b + rms / 3.0 * j));
    }
    mixtures
}

/// The outputs of a dense weight for a batch of inputs.
fn dense_outputs(weight: &[f32], x: &[f32], d_in: usize) -> Result<Vec<f32>, Box<dyn Error>> {
    let (d_out, kernels) = (weight.len() / d_in, Kernels::detect());
    let mut y = vec![0.0; x.len() / d_in * d_out];
    for (x, y) in x.chunks_exact(d_in).zip(y.chunks_exact_mut(d_out)) {
        kernels.gemv_dense(weight, x, y)?;
    }
    Ok(y)
}

/// The mean of the squared errors, and its gradient by the outputs.
fn loss_and_gradient(y: &[f32], target: &[f32], dy: &mut [f32]) -> f64 {
    let (mut sum, count) = (0.0, y.len() as f32);
    for ((y, target), dy) in y.iter().zip(target).zip(dy) {
        let error = y - target;
        sum += f64::from(error * error);
        *dy = 2.0 * error / count;
    }
    sum / f64::from(count)
}

/// Root mean square of the difference, relative to that of what was expected.
fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = squares(&mut got.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut expected.iter().map(|v| f64::from(*v)))).sqrt()
}

/// The loss over the steps: a line for each twentieth, with a bar on a logarithmic scale.
fn plot(losses: &[f64]) {
    const WIDTH: f64 = 60.0;
    let means: Vec<f64> = losses.chunks(STEPS / 20).map(|part| part.iter().sum::<f64>() / part.len() as f64).collect();
    let (low, high) = means.iter().fold((f64::MAX, 0.0_f64), |(low, high), m| (low.min(*m), high.max(*m)));
    println!("loss (mean of {} steps, logarithmic)", STEPS / 20);
    for (part, mean) in means.iter().enumerate() {
        let share = (mean / low).ln() / (high / low).ln();
        let bar: String = (0..60).map(|i| if f64::from(i) <= share * WIDTH { '#' } else { ' ' }).collect();
        println!("{:>5} {mean:>9.5} {}", (part + 1) * (STEPS / 20), bar.trim_end());
    }
}

/// `SplitMix64` (Steele, Lea, Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 16_777_216.0
    }

    /// One of `count`.
    fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.next() % count as u64).expect("less than `count`")
    }

    /// About normal values with deviation 1: the sum of 12 uniform ones, less 6. Unlike with a logarithm and a cosine
    /// their bits are the same on each machine.
    fn normal(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0).collect()
    }
}
