//! Steps of optimizers, and other changes of the adapter.

use nf4::{Error, LoRAScaling, QLoRALayer, Tensor};

use super::truth::{self, with_scale};
use super::{State, joined};
use crate::bits;

impl State<'_> {
    pub(super) fn sgd(&mut self) {
        let before = self.layer.clone();
        let result = self.sgd.step(self.layer.trainable_params());
        self.stepped(&before, result, |before, grad, _, after| truth::check_sgd(before, grad, 0.125, after));
    }

    pub(super) fn adamw(&mut self) {
        let (before, old) = (self.layer.clone(), self.adamw.state.clone());
        let result = self.adamw.step(self.layer.trainable_params());
        let new = self.adamw.state.clone();
        if old.len() != new.len() {
            return self.stepped(&before, result, |_, _, _, _| ());
        }
        self.stepped(&before, result, |before, grad, i, after| {
            truth::check_adamw(before, grad, 0.01, [&old[i], &new[i]], after);
        });
    }

    /// A step of an optimizer; `check` gets values, gradient and number of a tensor that was changed, and its new values.
    pub(super) fn stepped(
        &mut self,
        old: &QLoRALayer,
        result: Result<(), Error>,
        check: impl Fn(&[f32], &[f32], usize, &[f32]),
    ) {
        let mut old = old.clone();
        let old = old.trainable_params();
        let mut new = self.layer.clone();
        match result {
            Ok(()) => {
                for (i, (old, new)) in old.iter().zip(new.trainable_params()).enumerate() {
                    match old.grad().filter(|_| self.tame) {
                        Some(grad) => check(old.data(), grad, i, new.data()),
                        None => assert!(old.grad().is_some() || bits(old.data()) == bits(new.data())),
                    }
                }
            }
            Err(error) => {
                // The state of an optimizer is for the tensors that it was made for: with or without a magnitude.
                let other_tensors = matches!(error, Error::Shape(_)) && !self.adamw.state.is_empty();
                assert!(other_tensors || matches!(error, Error::NotFinite { .. }) && !self.tame, "{error}");
                assert!(old.iter().zip(new.trainable_params()).all(|(old, new)| bits(old.data()) == bits(new.data())));
            }
        }
        self.changed();
    }

    /// After a change of the adapter: with `DoRA` a forward is an error until the norms are recomputed.
    pub(super) fn changed(&mut self) {
        let zeros = Tensor::zeros(self.layer.d_in(), false);
        match self.layer.try_forward(&zeros) {
            Err(error) => assert!(error == Error::StaleNorms && self.layer.adapter().is_dora(), "{error}"),
            // Without inputs and outputs every batch is an empty one, which needs no norms.
            Ok(y) => assert!(!self.layer.adapter().is_dora() || y.is_empty(), "stale norms were used"),
        }
        self.layer.refresh_dora().expect("the lengths fit");
        let params = self.layer.clone();
        let magnitude = params.adapter().magnitude().map(Tensor::data).unwrap_or_default();
        self.tame &= [params.lora_a().data(), params.lora_b().data(), magnitude].iter().all(|v| truth::is_tame(v));
    }

    /// Another value in `A` or `B`; sometimes not a finite one.
    pub(super) fn change(&mut self, argument: usize) {
        let value = match argument {
            15 => f32::NAN,
            14 => f32::NEG_INFINITY,
            13 => 1e38,
            _ => self.inputs(1)[0],
        };
        let place = usize::from(self.bytes.byte());
        let tensor = if argument.is_multiple_of(2) { self.layer.lora_a_mut() } else { self.layer.lora_b_mut() };
        let len = tensor.len().max(1);
        if let Some(v) = tensor.data_mut().get_mut(place % len) {
            *v = value;
        }
        self.changed();
    }

    /// Another alpha and scaling, with `DoRA` or without.
    pub(super) fn rescale(&mut self, argument: usize) {
        let finite = [self.layer.lora_a(), self.layer.lora_b()].iter().all(|t| t.data().iter().all(|v| v.is_finite()));
        if !finite {
            return;
        }
        let scaling = if argument.is_multiple_of(2) { LoRAScaling::Standard } else { LoRAScaling::RsLoRA };
        let adapter = with_scale(self.layer.adapter(), argument as f64 - 5.0, scaling);
        let adapter = if (argument / 2).is_multiple_of(2) { adapter } else { adapter.with_dora() };
        let (arithmetic, (base, bias, _)) = (self.layer.arithmetic(), self.layer.clone().into_parts());
        let layer = joined(base, adapter).with_arithmetic(arithmetic);
        self.layer = match bias {
            Some(bias) => layer.with_bias(bias).expect("it was checked before"),
            None => layer,
        };
        self.tame &= self.has_tame_magnitude();
    }
}
