//! Forwards and backwards: every way to compute one gives the same bits, near the truth.

use nf4::{Adapters, Arithmetic, Error, Kernels, LoRALayer, MultiAdapterLayer, QLoRALayer, Tensor, bf16, f16};

use super::truth;
use super::{State, with_scale_or};
use crate::bits;

impl State<'_> {
    pub fn forward(&mut self) {
        let x = self.vector(self.layer.d_in());
        let y = self.layer.forward(&x);
        for k in Kernels::available() {
            let other = self.layer.clone().with_kernels(k).forward(&x);
            assert_eq!(bits(other.data()), bits(y.data()), "{} and {}", k.isa(), self.layer.kernels().isa());
        }
        if self.is_tame(x.data()) {
            truth::check_forward(&self.layer, &self.plain(), x.data(), y.data());
        }
    }

    pub(super) fn batch(&mut self, batch: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        let x = self.vector(batch * d_in);
        let y = self.layer.forward(&x);
        if d_in == 0 {
            return assert_eq!(y.len(), d_out);
        }
        for (x, y) in x.data().chunks(d_in).zip(y.data().chunks(d_out.max(1))) {
            let alone = self.layer.forward(&Tensor::from_vec(x.to_vec(), false));
            assert_eq!(bits(alone.data()), bits(y), "a vector of a batch of {batch}, and alone");
        }
        // In other types: inputs are converted first, outputs last.
        let halves: Vec<f16> = x.data().iter().map(|x| nf4::Float::from_f32(*x)).collect();
        let mut rounded = vec![bf16::ZERO; batch * d_out];
        let mut scratch = self.layer.scratch(batch);
        self.layer.forward_into(&halves, &mut scratch, &mut rounded).expect("the lengths fit");
        let exact = halves.iter().map(|x| nf4::Float::to_f32(*x)).collect();
        let y = self.layer.forward(&Tensor::from_vec(exact, false));
        let expected: Vec<bf16> = y.data().iter().map(|y| nf4::Float::from_f32(*y)).collect();
        assert_eq!(bits(&rounded), bits(&expected));
    }

    pub(super) fn backward(&mut self, batch: usize) {
        let (d_in, d_out) = (self.layer.d_in(), self.layer.d_out());
        // Without inputs, or without outputs, the other has to say how many vectors there are.
        let batch = if d_in == 0 { 0 } else { batch };
        let (x, dy) = (self.vector(batch * d_in), self.vector(batch * d_out));
        let before = self.layer.clone();
        let dx = self.layer.backward(&x, &dy);
        for k in Kernels::available() {
            let mut other = before.clone().with_kernels(k);
            assert_eq!(bits(other.backward(&x, &dy).data()), bits(dx.data()), "{}", k.isa());
            for (p, q) in other.trainable_params().iter().zip(self.layer.clone().trainable_params()) {
                assert_eq!(p.grad().map(bits), q.grad().map(bits), "gradients, {}", k.isa());
            }
        }
        let gradients = [self.layer.lora_a(), self.layer.lora_b()].map(|t| t.grad().unwrap_or_default());
        if self.is_tame(x.data()) && truth::is_tame(dy.data()) && d_in * d_out > 0 {
            // The gradient of the inputs of another arithmetic is quantized; tests of the kernels know how far it may be off.
            let exact = before.clone().with_arithmetic(Arithmetic::F32).backward(&x, &dy);
            truth::check_gradients(&before, x.data(), dy.data(), [gradients[0], gradients[1], exact.data()]);
        }
        self.tame &= gradients.iter().all(|g| truth::is_tame(g));
    }

    /// The same adapter, and others, on a layer of many.
    pub(super) fn multi(&mut self, argument: usize) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let mut multi = MultiAdapterLayer::new(base).with_arithmetic(self.layer.arithmetic());
        if let Some(bias) = bias {
            multi = multi.with_bias(bias).expect("it was checked before");
        }
        let x = self.vector(multi.d_in());
        let without = multi.forward(&x, Adapters::Active);
        let b = multi.add("b", adapter.clone()).expect("it fitted");
        multi.add("a", with_scale_or(&adapter, -2.0)).expect("it fitted");
        assert!(matches!(multi.add("a", adapter), Err(Error::DuplicateAdapter { .. })));
        multi.set_active(&["b"]).expect("it is there");
        let alone = self.layer.forward(&x);
        assert_eq!(
            bits(multi.forward(&x, Adapters::Active).data()),
            bits(alone.data()),
            "one adapter of many, and alone"
        );

        multi.set_active(&["a", "b"]).expect("both are there");
        assert!(multi.set_active(&["b", "c"]).is_err());
        let both = multi.forward(&x, Adapters::Active);
        multi.set_adapter_weight("a", argument as f32 - 8.0).expect("finite");
        assert_eq!(multi.names().collect::<Vec<_>>(), multi.active().collect::<Vec<_>>());
        if self.layer.d_in() > 0 {
            let batch = Tensor::from_vec(x.data().repeat(3), false);
            let y = multi.forward(&batch, Adapters::PerVector(&[Some(b), None, Some(b)]));
            let expected = [alone.data(), without.data(), alone.data()].concat();
            assert_eq!(bits(y.data()), bits(&expected), "an adapter for each vector");
        }
        multi.set_adapter_weight("a", 1.0).expect("finite");
        multi.rename("a", "z").expect("it is there");
        multi.rename("b", "a").expect("it is there");
        multi.remove("z").expect("it is there");
        assert_eq!(bits(multi.forward(&x, Adapters::Active).data()), bits(alone.data()), "after the others are gone");
        drop(both);
    }

    /// The layer on a dense base of the same weight.
    pub(super) fn dense(&mut self) {
        let (base, bias, adapter) = self.layer.clone().into_parts();
        let finite = [adapter.a(), adapter.b()].iter().all(|t| t.data().iter().all(|v| v.is_finite()));
        let weights = Tensor::from_vec(base.dequantize::<f32>(), false);
        let mut dense = LoRALayer::from_parts(weights, adapter).expect("it fitted");
        if let Some(bias) = bias {
            dense = dense.with_bias(bias).expect("it was checked before");
        }
        let x = self.vector(dense.d_in());
        let (y, weight) = (dense.forward(&x), bits(dense.base_weight().data()));
        dense.merge();
        assert_eq!(bits(dense.base_weight().data()), bits(&self.layer.merge_to_f32()), "merged");
        let _ = dense.forward(&x);
        dense.unmerge();
        assert_eq!(bits(dense.base_weight().data()), weight);
        assert_eq!(bits(dense.forward(&x).data()), bits(y.data()));
        if finite {
            // Quantized again, the weights are those of the base, or not: what is the same is the adapter.
            let again = QLoRALayer::try_from_lora(dense);
            assert!(again.is_ok_and(|layer| bits(layer.lora_a().data()) == bits(self.layer.lora_a().data())));
        }
    }
}
