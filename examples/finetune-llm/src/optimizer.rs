//! Gradients over several sequences, clipping, and steps of `AdamW` on the variables.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use nf4::optim::{AdamW, Moments};
use rayon::prelude::*;

/// The learning rate of each step: up to its peak in `warmup` steps, and down to zero with half a cosine.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The largest learning rate.
    pub peak: f64,
    /// Steps of the way up.
    pub warmup: usize,
    /// All steps.
    pub steps: usize,
}

impl Schedule {
    /// The learning rate of a step, counted from 0. None is zero before the last.
    #[must_use]
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let (done, all) = (step - self.warmup, self.steps.saturating_sub(self.warmup).max(1));
        let part = (done as f64 / all as f64).min(1.0);
        self.peak * 0.5 * (1.0 + (core::f64::consts::PI * part).cos())
    }
}

/// The variables by name, their gradients, and the state of `AdamW`.
#[derive(Debug)]
pub struct Optimizer {
    vars: BTreeMap<String, Var>,
    /// Values, in the order of `vars`, and gradients while a step is made.
    tensors: Vec<nf4::Tensor>,
    /// The sums of the gradients since the last step.
    sums: Vec<Vec<f32>>,
    /// One for each variable, so that threads share them.
    adamw: Vec<AdamW>,
}

impl Optimizer {
    /// An optimizer of all variables, with betas 0.9 and 0.999.
    ///
    /// # Errors
    /// The errors of candle.
    pub fn new(vars: &VarMap, weight_decay: f64) -> Result<Self> {
        let vars: BTreeMap<String, Var> =
            vars.data().lock().map_err(|_| anyhow!("poisoned variables"))?.clone().into_iter().collect();
        let tensors =
            vars.values().map(|var| Ok(nf4::Tensor::from_vec(flat(var)?, true))).collect::<Result<Vec<_>>>()?;
        let sums = tensors.iter().map(|tensor: &nf4::Tensor| vec![0.0; tensor.len()]).collect();
        let adamw = vec![AdamW { weight_decay, ..AdamW::new(0.0) }; vars.len()];
        Ok(Self { vars, tensors, sums, adamw })
    }

    /// Adds the gradients of all variables.
    ///
    /// # Errors
    /// The errors of candle.
    pub fn accumulate(&mut self, gradients: &GradStore) -> Result<()> {
        let all: Vec<_> = self.vars.values().map(|var| gradients.get(var)).collect();
        self.sums.par_iter_mut().zip(all).try_for_each(|(sum, gradient)| {
            if let Some(gradient) = gradient {
                sum.iter_mut().zip(flat(gradient)?).for_each(|(sum, g)| *sum += g);
            }
            Ok(())
        })
    }

    /// Scales the gradients so that their norm, over all variables, is at most `limit`, and returns what it was.
    pub fn clip(&mut self, limit: f64) -> f64 {
        let square = |sum: &Vec<f32>| sum.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        // Added in the order of the variables, so that the norm does not depend on threads.
        let squares: Vec<f64> = self.sums.par_iter().map(square).collect();
        let norm = squares.into_iter().sum::<f64>().sqrt();
        if norm > limit {
            #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
            let factor = (limit / norm) as f32;
            self.sums.par_iter_mut().for_each(|sum| sum.iter_mut().for_each(|g| *g *= factor));
        }
        norm
    }

    /// Makes a step with this learning rate; the gradients are zero after it.
    ///
    /// # Errors
    /// If a gradient is not finite; no variable has changed then.
    pub fn step(&mut self, rate: f64) -> Result<()> {
        let finite = self.sums.par_iter().all(|sum| sum.iter().all(|g| g.is_finite()));
        ensure!(finite, "a gradient is not finite");
        let vars: Vec<&Var> = self.vars.values().collect();
        let all = vars.into_par_iter().zip(&mut self.tensors).zip(&mut self.sums).zip(&mut self.adamw);
        all.try_for_each(|(((var, tensor), sum), adamw)| {
            tensor.zero_grad();
            tensor.accumulate_grad(sum)?;
            sum.fill(0.0);
            adamw.lr = rate;
            adamw.step([&mut *tensor])?;
            write(var, tensor)
        })
    }
}

/// Gives a variable its new values.
fn write(var: &Var, tensor: &nf4::Tensor) -> Result<()> {
    Ok(var.set(&Tensor::from_slice(tensor.data(), var.shape(), var.device())?)?)
}

/// What a checkpoint keeps of an [`Optimizer`].
pub(crate) struct State {
    /// By name: values and moments.
    pub(crate) tensors: BTreeMap<String, [Vec<f32>; 3]>,
    /// Steps made.
    pub(crate) step: u32,
}

impl Optimizer {
    pub(crate) fn state(&self) -> State {
        let moments = |place: usize, len: usize| match self.adamw[place].state.first() {
            Some(Moments { first, second, .. }) => [first.clone(), second.clone()],
            None => [vec![0.0; len], vec![0.0; len]],
        };
        let tensor = |(place, (name, tensor)): (usize, (&String, &nf4::Tensor))| {
            let [first, second] = moments(place, tensor.len());
            (name.clone(), [tensor.data().to_vec(), first, second])
        };
        State {
            tensors: self.vars.keys().zip(&self.tensors).enumerate().map(tensor).collect(),
            step: self.adamw.first().and_then(|adamw| adamw.state.first()).map_or(0, |moments| moments.step),
        }
    }

    /// Takes a state back.
    ///
    /// # Errors
    /// If it is not that of these variables.
    pub(crate) fn set_state(&mut self, mut state: State) -> Result<()> {
        let mut all = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in self.vars.keys().zip(&mut self.tensors) {
            let [values, first, second] =
                state.tensors.remove(name).with_context(|| format!("the checkpoint has no {name}"))?;
            for part in [&values, &first, &second] {
                ensure!(part.len() == tensor.len(), "{name} has {} values, not {}", part.len(), tensor.len());
            }
            tensor.data_mut().copy_from_slice(&values);
            all.push(Moments { step: state.step, first, second });
        }
        if let Some(name) = state.tensors.keys().next() {
            return Err(anyhow!("the checkpoint has {name}, which is not trained here"));
        }
        for (adamw, moments) in self.adamw.iter_mut().zip(all) {
            adamw.state = if state.step == 0 { Vec::new() } else { vec![moments] };
        }
        self.vars.values().zip(&self.tensors).try_for_each(|(var, tensor)| write(var, tensor))
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_go_up_and_down() {
        let schedule = Schedule { peak: 2.0, warmup: 4, steps: 12 };
        let rates: Vec<f64> = (0..=12).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates[..5], [0.5, 1.0, 1.5, 2.0, 2.0]);
        assert!((rates[8] - 1.0).abs() < 1e-12 && rates[12].abs() < 1e-12, "{rates:?}");
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
        assert_eq!(Schedule { peak: 1.0, warmup: 0, steps: 1 }.rate(0), 1.0);
        assert_eq!(Schedule { peak: 1.0, warmup: 5, steps: 5 }.rate(4), 1.0);
    }
}
