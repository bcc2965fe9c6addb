//! Optimizers, which update trained tensors by their gradients.
//!
//! An optimizer keeps its state in the order in which it is given the tensors, so it must be given the same ones in every
//! step. Several layers can share an optimizer if their parameters are chained:
//!
//! ```
//! use nf4::{QLoRALayer, Tensor, optim::AdamW};
//! let new = || QLoRALayer::new(Tensor::zeros(4 * 64, false), 4, 64, 2, 4.0);
//! let (mut layers, mut optimizer) = ([new(), new()], AdamW::new(1e-3));
//! let (x, dy) = (Tensor::from_vec(vec![1.0; 64], false), Tensor::from_vec(vec![0.5; 4], false));
//! for _ in 0..3 {
//!     for layer in &mut layers {
//!         layer.zero_grad();
//!         layer.backward(&x, &dy);
//!     }
//!     optimizer.step(layers.iter_mut().flat_map(|layer| layer.trainable_params()))?;
//! }
//! # assert!(layers[1].lora_b().data().iter().all(|b| *b != 0.0));
//! # Ok::<(), nf4::Error>(())
//! ```
//!
//! Hyperparameters are f64, and so is what is computed from them alone, as in `PyTorch`; values, gradients and state are
//! f32, with every operation rounded on its own. So a step has the same bits on every machine.
//!
//! Tensors without a gradient, and tensors that are not trained, are left as they are. A gradient that is NaN or infinite
//! is an error, and then nothing has changed: no value, no gradient, and no state.

use alloc::vec::Vec;

use crate::buffer::{reserved, zeros};
use crate::error::{Error, check_finite, check_len};
use crate::round::to_f32;
use crate::tensor::Tensor;

/// Stochastic gradient descent like `torch.optim.SGD`, without dampening and without Nesterov momentum.
///
/// For each value `p` with gradient `g`:
///
/// ```text
/// g = g + weight_decay * p            if weight_decay is not 0
/// v = momentum * v + g;  g = v        if momentum is not 0; v starts at 0
/// p = p - lr * g
/// ```
#[derive(Debug, Clone)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Momentum; 0 for none.
    pub momentum: f64,
    /// Weight decay, added to the gradient; 0 for none.
    pub weight_decay: f64,
    /// The `v` of each tensor, in the order of the tensors; empty before the first step with momentum.
    pub state: Vec<Vec<f32>>,
}

impl Sgd {
    /// Plain gradient descent.
    #[must_use]
    pub const fn new(lr: f64) -> Self {
        Self { lr, momentum: 0.0, weight_decay: 0.0, state: Vec::new() }
    }

    /// Makes one step over the tensors.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a hyperparameter or a gradient is NaN or infinite; [`Error::Shape`] if the state belongs to
    /// another number of tensors, or to tensors of other lengths; [`Error::OutOfMemory`] if there is no memory for the
    /// state. Nothing has then changed.
    pub fn step<'a>(&mut self, params: impl IntoIterator<Item = &'a mut Tensor>) -> Result<(), Error> {
        let [lr, momentum, decay] = [self.lr, self.momentum, self.weight_decay].map(to_f32);
        check_finite("lr, momentum, weight decay", &[lr, momentum, decay])?;
        let params = checked(params)?;
        if momentum == 0.0 {
            for (data, grad) in params.into_iter().filter_map(values_and_grad) {
                data.iter_mut().zip(grad).for_each(|(p, g)| *p -= lr * decayed(decay, *p, *g));
            }
            return Ok(());
        }
        if self.state.is_empty() {
            self.state = fresh_state(&params, |len| zeros(1, len))?;
        }
        check_state(&params, self.state.iter().map(Vec::len))?;
        for (param, velocity) in params.into_iter().zip(&mut self.state) {
            let Some((data, grad)) = values_and_grad(param) else { continue };
            for ((p, g), v) in data.iter_mut().zip(grad).zip(velocity) {
                *v = momentum * *v + decayed(decay, *p, *g);
                *p -= lr * *v;
            }
        }
        Ok(())
    }
}

/// `AdamW` (Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019), like `torch.optim.AdamW` without its
/// variants.
///
/// For each value `p` with gradient `g`, in step `t` of its tensor, counted from 1:
///
/// ```text
/// p = p * (1 - lr * weight_decay)
/// m = m + (1 - beta1) * (g - m)
/// v = beta2 * v + (1 - beta2) * g * g
/// p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// ```
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the divisor.
    pub eps: f64,
    /// Weight decay, applied to the values themselves; 0 for none.
    pub weight_decay: f64,
    /// The moments of each tensor, in the order of the tensors; empty before the first step.
    pub state: Vec<Moments>,
}

/// The state that [`AdamW`] keeps for a tensor.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moments {
    /// Number of steps so far.
    pub step: u32,
    /// Running mean of the gradients, one per value.
    pub first: Vec<f32>,
    /// Running mean of the squared gradients, one per value.
    pub second: Vec<f32>,
}

impl AdamW {
    /// `AdamW` with the defaults of `PyTorch`: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    #[must_use]
    pub const fn new(lr: f64) -> Self {
        Self { lr, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, state: Vec::new() }
    }

    /// Makes one step over the tensors.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a hyperparameter or a gradient is NaN or infinite; [`Error::Shape`] if the state belongs to
    /// another number of tensors, or to tensors of other lengths; [`Error::OutOfMemory`] if there is no memory for the
    /// state. Nothing has then changed.
    pub fn step<'a>(&mut self, params: impl IntoIterator<Item = &'a mut Tensor>) -> Result<(), Error> {
        let Self { lr, betas: [beta1, beta2], eps, weight_decay, .. } = *self;
        check_finite("lr, betas, eps, weight decay", &[lr, beta1, beta2, eps, weight_decay].map(to_f32))?;
        let params = checked(params)?;
        if self.state.is_empty() {
            let moments = |len| Ok(Moments { step: 0, first: zeros(1, len)?, second: zeros(1, len)? });
            self.state = fresh_state(&params, moments)?;
        }
        check_state(&params, self.state.iter().map(|m| m.first.len()))?;
        check_state(&params, self.state.iter().map(|m| m.second.len()))?;

        let keep = to_f32(1.0 - lr * weight_decay);
        let [fresh1, keep2, fresh2, eps] = [1.0 - beta1, beta2, 1.0 - beta2, eps].map(to_f32);
        for (param, moments) in params.into_iter().zip(&mut self.state) {
            let Some((data, grad)) = values_and_grad(param) else { continue };
            moments.step = moments.step.saturating_add(1);
            let t = f64::from(moments.step);
            let rate = to_f32(lr / (1.0 - libm::pow(beta1, t)));
            let correction = to_f32(libm::sqrt(1.0 - libm::pow(beta2, t)));
            let moments = moments.first.iter_mut().zip(&mut moments.second);
            for ((p, g), (m, v)) in data.iter_mut().zip(grad).zip(moments) {
                *p *= keep;
                *m += fresh1 * (g - *m);
                *v = keep2 * *v + fresh2 * (g * g);
                *p -= rate * (*m / (libm::sqrtf(*v) / correction + eps));
            }
        }
        Ok(())
    }
}

/// The gradient with the weight decay of [`Sgd`].
fn decayed(decay: f32, p: f32, g: f32) -> f32 {
    if decay == 0.0 { g } else { g + decay * p }
}

/// The values of a tensor that is trained, and their gradient if there is one.
fn values_and_grad(param: &mut Tensor) -> Option<(&mut [f32], &[f32])> {
    let trained = param.requires_grad();
    let (data, grad) = param.data_mut_and_grad();
    grad.filter(|_| trained).map(|grad| (data, grad))
}

/// The tensors, if every gradient is finite.
fn checked<'a>(params: impl IntoIterator<Item = &'a mut Tensor>) -> Result<Vec<&'a mut Tensor>, Error> {
    let params: Vec<_> = params.into_iter().collect();
    params.iter().filter_map(|p| p.grad()).try_for_each(|grad| check_finite("gradient", grad))?;
    Ok(params)
}

/// A state for each tensor, made from its length.
fn fresh_state<S>(params: &[&mut Tensor], state: impl Fn(usize) -> Result<S, Error>) -> Result<Vec<S>, Error> {
    let mut states = reserved(1, params.len())?;
    for param in params {
        states.push(state(param.len())?);
    }
    Ok(states)
}

/// `Ok` if there is a state of the right length for each tensor.
fn check_state(params: &[&mut Tensor], state: impl ExactSizeIterator<Item = usize>) -> Result<(), Error> {
    check_len("tensors of an optimizer", state.len(), params.len())?;
    params.iter().zip(state).try_for_each(|(p, len)| check_len("tensor of an optimizer", len, p.len()))
}
