//! The output head and the cross entropy in one.
//!
//! Logits of a whole sequence are the largest tensor of a small model: 512 tokens of 49152 f32 are 100 MB, and a chain of
//! operations keeps several of them. Here, value and gradient are made together for some tokens at a time, and only the
//! gradient of the hidden states is kept.

use std::sync::Mutex;

use candle_core::{CpuStorage, Error, InplaceOp1, Layout, Result, Storage, Tensor};
use nf4_llama::exp;
use rayon::prelude::*;

/// Tokens whose logits are held at a time: 25 MB. With fewer, the head is read and packed for the product more often.
const TOKENS: usize = 128;

/// The sum of the cross entropies of `x` `[tokens, hidden]` with the head `[vocabulary, hidden]` and a target for each token.
/// If it is wanted, the gradient of `x` is written.
///
/// # Errors
/// A message for a target that is not below the vocabulary's size.
pub(crate) fn cross_entropy(x: &[f32], head: &Tensor, targets: &[u32], mut dx: Option<&mut [f32]>) -> Result<f64> {
    let (hidden, mut loss) = (head.dim(1)?, 0.0);
    for (part, targets) in targets.chunks(TOKENS).enumerate() {
        let at = part * TOKENS * hidden..(part * TOKENS + targets.len()) * hidden;
        let x = Tensor::from_slice(&x[at.clone()], (targets.len(), hidden), head.device())?;
        let logits = x.matmul(&head.t()?)?;
        let softmax = Softmax { targets, wants_gradient: dx.is_some(), loss: Mutex::new(0.0) };
        logits.inplace_op1(&softmax)?;
        loss += softmax.loss.into_inner().unwrap_or(f64::NAN);
        if let Some(dx) = &mut dx {
            let gradient = logits.matmul(head)?;
            let (storage, layout) = gradient.storage_and_layout();
            let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
                return Err(Error::Msg("not in order on the CPU".to_string()).bt());
            };
            dx[at].copy_from_slice(&storage.as_slice()?[start..end]);
        }
    }
    Ok(loss)
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
        let max = largest(logits);
        let at_target = f64::from(logits[target]) - f64::from(max);
        let mut sum = 0.0_f64;
        for part in logits.chunks_mut(256) {
            for x in part.iter_mut() {
                *x = exp(*x - max);
            }
            sum += f64::from(crate::ops::sum(part, part, |x, _| x));
        }
        if self.wants_gradient {
            #[allow(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
            let factor = (1.0 / sum) as f32;
            logits.iter_mut().for_each(|x| *x *= factor);
            logits[target] -= 1.0;
        }
        sum.ln() - at_target
    }
}

/// The largest of some values; NaN if there is one.
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    // What is not at most the largest so far, as is no NaN.
    let later = |max: f32, x: f32| if x <= max || max.is_nan() { max } else { x };
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, x)| *lane = later(*lane, *x));
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, x| later(max, *x))
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
        let x = values(tokens * WIDTH, 0.0);
        let head = Tensor::from_vec(values(50 * WIDTH, 1.0), (50, WIDTH), &Device::Cpu).unwrap();
        let targets: Vec<u32> = (0..tokens).map(|i| u32::try_from(i * 7 % 50).unwrap()).collect();

        let mut dx = vec![0.0; x.len()];
        let loss = cross_entropy(&x, &head, &targets, Some(&mut dx)).unwrap();

        let var = Var::from_vec(x.clone(), (tokens, WIDTH), &Device::Cpu).unwrap();
        let logits = var.matmul(&head.t().unwrap()).unwrap();
        let wanted = Tensor::from_slice(&targets, tokens, &Device::Cpu).unwrap();
        let long = (candle_nn::loss::cross_entropy(&logits, &wanted).unwrap() * tokens as f64).unwrap();
        let gradients = long.backward().unwrap();
        let exact = f64::from(long.to_scalar::<f32>().unwrap());
        assert!((loss - exact).abs() < 1e-4 * exact, "{loss} {exact}");
        let exact = gradients.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (got, exact) in dx.iter().zip(exact) {
            assert!((got - exact).abs() < 1e-5, "{got} {exact}");
        }

        // Where no gradient is wanted there is the same value.
        assert_eq!(cross_entropy(&x, &head, &targets, None).unwrap(), loss);
        assert!(cross_entropy(&x, &head, &vec![50; tokens], None).unwrap_err().to_string().contains("50"));
    }

    #[test]
    fn nan_is_largest() {
        assert_eq!(largest(&[1.0; 20]), 1.0);
        assert_eq!(largest(&[[-3.0; 17].as_slice(), &[-2.0]].concat()), -2.0);
        assert!(largest(&[[-3.0; 17].as_slice(), &[f32::NAN, 5.0]].concat()).is_nan());
        assert!(largest(&[[f32::NAN; 3].as_slice(), &[7.0; 30]].concat()).is_nan());
    }
}
