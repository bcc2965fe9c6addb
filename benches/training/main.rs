//! Steps of training for `training.py`: reads what to do from standard input, and prints milliseconds.
//!
//! `layer SIZE RANK BATCH ARITHMETIC` makes a layer `[SIZE, SIZE]`, answered by `ready`; `step DX`, with 1 or 0 for whether
//! the input gets a gradient, runs a forward, a backward and a step of `AdamW`, answered by the milliseconds of each. `values
//! NAME` is answered by the values of `y`, `dx`, or the gradients `da` and `db` that the last step left.

#![allow(clippy::cast_precision_loss, reason = "inputs are small integers")]

use core::error::Error;
use std::io::{Write, stdin, stdout};
use std::time::Instant;

use nf4::optim::AdamW;
use nf4::{Arithmetic, BackwardScratch, BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Scratch};

/// A layer, what its steps need, and a batch.
struct Task {
    layer: QLoRALayer,
    optimizer: AdamW,
    scratch: Scratch,
    backward_scratch: BackwardScratch,
    x: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
}

impl Task {
    fn new(size: usize, rank: usize, batch: usize, arithmetic: Arithmetic) -> Result<Self, Box<dyn Error>> {
        let values =
            |n: usize, scale: f32| (0..n).map(|i| (i % 1009) as f32 * scale - 504.0 * scale).collect::<Vec<_>>();
        let base = Quantized4Bit::quantize(&values(size * size, 1e-4), size, size, BlockSize::B64, true)?;
        // Not zero, as a new `B` is, so that no gradient is.
        let (a, b) = (values(rank * size, 1e-4), values(size * rank, 2e-5));
        let adapter = LoRAAdapter::from_parts(a, b, size, size, rank, 2.0 * rank as f64, LoRAScaling::Standard)?;
        let layer = QLoRALayer::from_parts(base, adapter)?.with_arithmetic(arithmetic);
        Ok(Self {
            optimizer: AdamW::new(1e-4),
            scratch: layer.scratch(batch),
            backward_scratch: layer.backward_scratch(batch),
            layer,
            x: values(batch * size, 2e-3),
            y: vec![0.0; batch * size],
            dy: values(batch * size, 1e-3),
            dx: vec![0.0; batch * size],
        })
    }

    /// Milliseconds of forward, backward and optimizer.
    fn step(&mut self, with_dx: bool) -> Result<[f64; 3], Box<dyn Error>> {
        let start = Instant::now();
        self.layer.forward_into(&self.x, &mut self.scratch, &mut self.y)?;
        let forward = start.elapsed();
        self.layer.zero_grad();
        let dx = with_dx.then_some(&mut self.dx[..]);
        self.layer.backward_into(&self.x, &self.dy, &mut self.backward_scratch, dx)?;
        let backward = start.elapsed() - forward;
        self.optimizer.step(self.layer.trainable_params())?;
        let optimizer = start.elapsed() - forward - backward;
        Ok([forward, backward, optimizer].map(|time| time.as_secs_f64() * 1e3))
    }

    /// What the last step left, by its name.
    fn values(&self, name: &str) -> Option<&[f32]> {
        match name {
            "y" => Some(&self.y),
            "dx" => Some(&self.dx),
            "da" => self.layer.lora_a().grad(),
            "db" => self.layer.lora_b().grad(),
            _ => None,
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut task = None;
    for line in stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        let answer = match (&words[..], &mut task) {
            (["layer", size, rank, batch, arithmetic], task) => {
                let arithmetic = [Arithmetic::SixteenByFour, Arithmetic::EightByEight, Arithmetic::F32]
                    .into_iter()
                    .find(|known| known.name() == *arithmetic)
                    .ok_or_else(|| format!("no arithmetic {arithmetic}"))?;
                *task = Some(Task::new(size.parse()?, rank.parse()?, batch.parse()?, arithmetic)?);
                "ready".to_owned()
            }
            (["step", dx], Some(task)) => {
                let [forward, backward, optimizer] = task.step(*dx == "1")?;
                format!("{forward} {backward} {optimizer}")
            }
            (["values", name], Some(task)) => {
                let values = task.values(name).ok_or_else(|| format!("no values {name}"))?;
                values.iter().map(f32::to_string).collect::<Vec<_>>().join(" ")
            }
            _ => return Err(format!("cannot do `{line}`").into()),
        };
        println!("{answer}");
        stdout().flush()?;
    }
    Ok(())
}
