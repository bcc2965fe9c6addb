//! The output head and the cross entropy in one.
//!
//! Logits of a whole sequence are the largest tensor of a small model: 128 tokens of 49152 f32 are 25 MB, and a chain of
//! operations keeps several of them. Here, value and gradient are made together for some tokens at a time, and only the
//! gradient of the hidden states is kept.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, Error, InplaceOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Tokens whose logits are held at a time.
const TOKENS: usize = 64;

/// The sum of the cross entropies of `x` `[tokens, hidden]` with the head `[vocabulary, hidden]` and a target for each
/// token: a scalar that a gradient flows back from, to `x` alone.
///
/// # Errors
/// A message for a target that is not below the vocabulary's size.
pub(crate) fn cross_entropy(x: &Tensor, head: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let wants_gradient = x.track_op();
    let (mut loss, mut gradients) = (0.0, Vec::new());
    for (part, targets) in targets.chunks(TOKENS).enumerate() {
        let x = x.detach().narrow(0, part * TOKENS, targets.len())?;
        let logits = x.matmul(&head.t()?)?;
        let softmax = Softmax { targets, wants_gradient, loss: Mutex::new(0.0) };
        logits.inplace_op1(&softmax)?;
        loss += softmax.loss.into_inner().unwrap_or(f64::NAN);
        if wants_gradient {
            gradients.push(logits.matmul(head)?);
        }
    }
    if !wants_gradient {
        return Tensor::new(to_f32(loss), x.device());
    }
    x.apply_op1(Known { value: to_f32(loss), gradient: Tensor::cat(&gradients, 0)? })
}

#[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn to_f32(value: f64) -> f32 {
    value as f32
}

/// A function whose value and gradient are known already.
struct Known {
    value: f32,
    gradient: Tensor,
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value]), Shape::from(())))
    }

    fn bwd(&self, _x: &Tensor, _loss: &Tensor, by_loss: &Tensor) -> Result<Option<Tensor>> {
        self.gradient.broadcast_mul(by_loss).map(Some)
    }
}

/// Adds the cross entropies of logits `[targets.len(), vocabulary]` to `loss`, and, if it is wanted, puts their gradient in
/// the place of the logits.
struct Softmax<'a> {
    targets: &'a [u32],
    wants_gradient: bool,
    loss: Mutex<f64>,
}

impl InplaceOp1 for Softmax<'_> {
    fn name(&self) -> &'static str {
        "softmax of logits"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(logits) = storage else { return Err(Error::Msg("logits are not f32".to_string()).bt()) };
        let vocabulary = layout.dims().last().copied().unwrap_or(1);
        let losses: Result<Vec<f64>> = logits
            .par_chunks_mut(vocabulary)
            .zip(self.targets)
            .map(|(logits, target)| {
                let place = usize::try_from(*target).ok().filter(|place| *place < vocabulary);
                let Some(place) = place else {
                    return Err(Error::Msg(format!("token {target} in a vocabulary of {vocabulary}")).bt());
                };
                Ok(self.row(logits, place))
            })
            .collect();
        // In the order of the tokens, so that the sum does not depend on threads.
        let sum = losses?.into_iter().sum::<f64>();
        if let Ok(mut loss) = self.loss.lock() {
            *loss = sum;
        }
        Ok(())
    }
}

impl Softmax<'_> {
    fn row(&self, logits: &mut [f32], target: usize) -> f64 {
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
        let at_target = f64::from(logits[target]) - f64::from(max);
        let mut sum = 0.0_f64;
        for part in logits.chunks_mut(256) {
            let mut partial = 0.0_f32;
            for x in part {
                *x = (*x - max).exp();
                partial += *x;
            }
            sum += f64::from(partial);
        }
        if self.wants_gradient {
            let factor = to_f32(1.0 / sum);
            logits.iter_mut().for_each(|x| *x *= factor);
            logits[target] -= 1.0;
        }
        sum.ln() - at_target
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

    use candle_core::{Device, Var};

    use super::*;

    /// More tokens than are held at a time, against the chain of candle's operations, in f32.
    #[test]
    fn values_and_gradients_are_those_of_the_long_way() {
        const WIDTH: usize = 8;
        let values = |len: usize, seed: f32| (0..len).map(|i| (i as f32 * 1.3 + seed).sin()).collect::<Vec<f32>>();
        let tokens = 2 * TOKENS + 3;
        let x = Var::from_vec(values(tokens * WIDTH, 0.0), (tokens, WIDTH), &Device::Cpu).unwrap();
        let head = Tensor::from_vec(values(50 * WIDTH, 1.0), (50, WIDTH), &Device::Cpu).unwrap();
        let targets: Vec<u32> = (0..tokens).map(|i| u32::try_from(i * 7 % 50).unwrap()).collect();

        let loss = cross_entropy(&x, &head, &targets).unwrap();
        let gradients = (loss.clone() * 0.5).unwrap().backward().unwrap();

        let logits = x.matmul(&head.t().unwrap()).unwrap();
        let wanted = Tensor::from_slice(&targets, tokens, &Device::Cpu).unwrap();
        let mean = candle_nn::loss::cross_entropy(&logits, &wanted).unwrap();
        let long = (mean * tokens as f64).unwrap();
        let exact = (long.clone() * 0.5).unwrap().backward().unwrap();
        let [a, b] = [&loss, &long].map(|t| t.to_scalar::<f32>().unwrap());
        assert!((a - b).abs() < 1e-4 * b, "{a} {b}");
        let [a, b] = [gradients.get(&x).unwrap(), exact.get(&x).unwrap()];
        let error = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");

        // Without a variable there is the same value, and no gradient.
        let alone = cross_entropy(&x.as_detached_tensor(), &head, &targets).unwrap();
        assert_eq!(alone.to_scalar::<f32>().unwrap(), loss.to_scalar::<f32>().unwrap());
        assert!(cross_entropy(&x, &head, &vec![50; tokens]).unwrap_err().to_string().contains("50"));
    }
}
