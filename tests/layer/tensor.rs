//! Tensors and fresh adapters.

use nf4::{DEFAULT_SEED, LoRAAdapter, LoRALayer, LoRAScaling, QLoRALayer, Tensor};

#[test]
fn gradients_accumulate() {
    let mut t = Tensor::from_vec(vec![1.0, 2.0], true);
    assert_eq!((t.len(), t.requires_grad(), t.grad()), (2, true, None));
    t.accumulate_grad(&[1.0, -1.0]).unwrap();
    t.accumulate_grad(&[0.5, 0.5]).unwrap();
    assert_eq!(t.grad(), Some(&[1.5, -0.5][..]));
    let (data, grad) = t.data_mut_and_grad();
    data.iter_mut().zip(grad.unwrap()).for_each(|(p, g)| *p -= g);
    assert_eq!(t.data(), [-0.5, 2.5]);
    t.zero_grad();
    assert_eq!(t.grad(), Some(&[0.0, 0.0][..]));
    t.clear_grad();
    assert_eq!(t.grad(), None);
    assert_eq!(t.accumulate_grad(&[1.0]).unwrap_err().to_string(), "gradient: expected length 2, got 1");
    assert_eq!(t.into_vec(), [-0.5, 2.5]);

    let mut frozen = Tensor::zeros(3, false);
    frozen.accumulate_grad(&[1.0; 3]).unwrap();
    assert_eq!(frozen.grad(), None);
    assert_eq!((frozen.memory_bytes(), frozen.is_empty()), (12, false));
}

#[test]
fn memory_of_a_tensor_is_exact() {
    let mut data = Vec::with_capacity(1000);
    data.push(1.0);
    assert_eq!(Tensor::from_vec(data, true).into_vec().capacity(), 1);
}

#[test]
fn trainable_params_are_a_and_b() {
    let mut layer = QLoRALayer::new(Tensor::zeros(4 * 64, false), 4, 64, 2, 2.0);
    let lens: Vec<_> = layer.trainable_params().iter().map(|p| (p.len(), p.requires_grad())).collect();
    assert_eq!(lens, [(2 * 64, true), (4 * 2, true)]);
    let mut lora = LoRALayer::new(Tensor::zeros(4 * 64, false), 4, 64, 2, 2.0);
    lora.trainable_params()[0].data_mut()[3] = 7.0;
    lora.lora_a_mut().data_mut()[4] = 8.0;
    assert_eq!(lora.lora_a().data()[3..5], [7.0, 8.0]);
}

#[test]
fn a_starts_uniform_and_b_zero() {
    let (d_out, d_in, rank) = (3, 256, 40);
    let fresh = |seed| LoRAAdapter::new(d_out, d_in, rank, 1.0, LoRAScaling::Standard, seed).unwrap();
    let adapter = fresh(DEFAULT_SEED);
    let (a, bound) = (adapter.a().data(), 1.0 / 16.0);
    assert_eq!((a.len(), adapter.b().data()), (rank * d_in, &[0.0; 120][..]));
    // The first outputs of SplitMix64 with state 0 are e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f.
    for (value, upper) in a.iter().zip([0xe2_20a8_u32, 0x6e_789e, 0x06_c45d]) {
        assert_eq!(f64::from(*value), (f64::from(upper) / 8_388_608.0 - 1.0) * bound);
    }
    assert!(a.iter().all(|v| f64::from(v.abs()) <= bound));
    // Mean and variance of n uniform values: 0 and bound^2/3, with deviations bound/sqrt(3n) and bound^2 sqrt(4/45n);
    // six deviations are allowed.
    let n = a.len() as f64;
    let mean = a.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 6.0 * bound / (3.0 * n).sqrt(), "{mean}");
    assert!((variance - bound * bound / 3.0).abs() < 6.0 * bound * bound * (4.0 / (45.0 * n)).sqrt(), "{variance}");
    assert_ne!(fresh(1).a().data(), a);
    let layer = QLoRALayer::new(Tensor::zeros(d_out * d_in, false), d_out, d_in, rank, 1.0);
    assert_eq!(layer.lora_a().data(), a);
}

#[test]
fn scales() {
    assert_eq!(LoRAScaling::Standard.compute(16.0, 8), 2.0);
    assert_eq!(LoRAScaling::Standard.compute(1.0, 3), 1.0 / 3.0);
    assert_eq!(LoRAScaling::RsLoRA.compute(16.0, 64), 2.0);
    // The nearest f32: neighbours of 16 / sqrt(8) are 2^-21 apart.
    let scale = f64::from(LoRAScaling::RsLoRA.compute(16.0, 8));
    assert!((scale - 5.656_854_249_492_38).abs() <= 1.0 / 4_194_304.0);
    // Alphas that no f32 has: what PEFT computes in f64, rounded once. By way of an f32 all would be an ulp off.
    for (scaling, alpha, rank, expected) in [
        (LoRAScaling::Standard, 0.3, 5, 0x3d75_c28f),
        (LoRAScaling::Standard, 62.2, 5, 0x4147_0a3d),
        (LoRAScaling::RsLoRA, 0.1, 3, 0x3d6c_7b90),
        (LoRAScaling::RsLoRA, 39.1, 12, 0x4134_985d),
    ] {
        assert_eq!(scaling.compute(alpha, rank).to_bits(), expected);
        let adapter = LoRAAdapter::new(1, 1, rank, alpha, scaling, 0).unwrap();
        assert_eq!((adapter.scale().to_bits(), adapter.alpha()), (expected, alpha));
    }
    let layer = LoRALayer::new_with_scaling(Tensor::zeros(64, false), 1, 64, 16, 8.0, LoRAScaling::RsLoRA);
    assert_eq!(layer.scale(), 2.0);
    assert_eq!(LoRALayer::new(Tensor::zeros(64, false), 1, 64, 16, 8.0).scale(), 0.5);
}
