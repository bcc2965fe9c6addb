//! Operations on any number of variables.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use half::f16;
use nf4_candle::function;

/// The value is what was given, in its type and order; gradients have the types of the variables.
#[test]
fn types_and_order_stay() {
    let floats = Tensor::arange(0.0_f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
    let half = Var::from_slice(&[f16::from_f32(2.0); 2], 2, &Device::Cpu).unwrap();
    let single = Var::new(3.0_f32, &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let value = floats.to_dtype(dtype).unwrap().t().unwrap().narrow(0, 1, 2).unwrap();
        let variables = [half.as_tensor().clone(), single.as_tensor().clone()];
        let y = function(&value, &variables, move |dy| {
            assert_eq!((dy.dims(), dy.dtype()), (&[2, 2][..], dtype));
            // One third is not an f16.
            Ok(vec![vec![1.0 / 3.0, 2.0], vec![1.0 / 3.0]])
        })
        .unwrap();
        assert_eq!(y.dtype(), dtype);
        let values = y.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values, [[1.0, 4.0], [2.0, 5.0]]);
        let gradients = y.sum_all().unwrap().backward().unwrap();
        let of_half = gradients.get(&half).unwrap().to_vec1::<f16>().unwrap();
        assert_eq!(of_half, [f16::from_f32(1.0 / 3.0), f16::from_f32(2.0)]);
        assert_eq!(gradients.get(&single).unwrap().to_scalar::<f32>().unwrap(), 1.0 / 3.0);
    }
}

#[test]
fn wrong_gradients_are_errors() {
    let variable = Var::new(&[1.0_f32, 2.0], &Device::Cpu).unwrap();
    for (gradients, expected) in [(Vec::new(), "0 gradients of 1 variables"), (vec![vec![1.0]], "shape")] {
        let value = Tensor::new(1.0_f32, &Device::Cpu).unwrap();
        let y = function(&value, &[variable.as_tensor().clone()], move |_| Ok(gradients.clone())).unwrap();
        let error = y.backward().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
