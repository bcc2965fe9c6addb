//! Layers, as a user makes them, against what `bitsandbytes` and PEFT gave: outputs, gradients and merged weights.

use nf4::{
    AbsmaxBuf, Adapters, Arithmetic, Kernels, LoRAAdapter, LoRAScaling, MultiAdapterLayer, QLoRALayer, Quantized4Bit,
};
use serde_json::Value;

use crate::products::{f32_tolerance, largest, sixteen_by_four_bounds};
use crate::support::{Checker, Quantized, Scales, Tensor, Tensors};

/// The largest error of gradients and merged weights as a fraction of the largest value, as for outputs.
const GRADIENT_TOLERANCE: f64 = 3e-6;
const MERGED_TOLERANCE: f64 = 1e-6;

/// The weight with its owner.
pub(crate) fn owned(layer: &Quantized) -> Quantized4Bit {
    let absmax = match &layer.scales {
        Scales::Plain(absmax) => AbsmaxBuf::plain(absmax.clone()),
        Scales::Nested(nested) => {
            AbsmaxBuf::nested(nested.codes.clone(), nested.absmax.clone(), &nested.map, nested.offset).unwrap()
        }
    };
    Quantized4Bit::from_parts(layer.packed.clone(), absmax, layer.rows, layer.cols, layer.block_size).unwrap()
}

/// A layer without adapters: its outputs for a batch in both arithmetics, against `y64`.
pub(crate) fn linear(c: &mut Checker, name: &str, layer: &Quantized, x: &Tensor, bias: Option<&[f32]>, y64: &Tensor) {
    let (x, expected) = (x.values::<f32>(), y64.values::<f64>());
    let outputs = |kernels: Kernels, arithmetic: Arithmetic| {
        let mut linear = MultiAdapterLayer::new(owned(layer)).with_kernels(kernels).with_arithmetic(arithmetic);
        if let Some(bias) = bias {
            linear = linear.with_bias(bias.to_vec()).unwrap();
        }
        linear.forward(&tensor(&x), Adapters::Active).into_vec()
    };
    let gains = vec![1.0; layer.rows];
    check_outputs(c, name, layer, &x, &gains, &expected, &outputs);
}

/// Outputs in both arithmetics. The 16x4 product may be off by its own bound, times the gain of its row, and all that
/// is f32 by what the f32 forward may be off.
fn check_outputs(
    c: &mut Checker,
    name: &str,
    layer: &Quantized,
    x: &[f32],
    gains: &[f64],
    expected: &[f64],
    outputs: &dyn Fn(Kernels, Arithmetic) -> Vec<f32>,
) {
    let tolerance = f32_tolerance(layer.cols) * largest(expected);
    let [plain, quantized] = [Arithmetic::F32, Arithmetic::SixteenByFour].map(|a| outputs(c.kernels, a));
    c.within(name, "f32 layer", &to_f64(&plain), expected, |_| tolerance);
    c.same_as_scalar(&format!("{name}, f32 layer"), &plain, |k| outputs(k, Arithmetic::F32));
    let bounds: Vec<f64> = if layer.matrix().is_row_aligned() {
        x.chunks(layer.cols).flat_map(|x| sixteen_by_four_bounds(layer, x)).collect()
    } else {
        vec![0.0; expected.len()]
    };
    let allowed = |i: usize| bounds[i] * gains[i % layer.rows] + tolerance;
    c.within(name, "16x4 layer", &to_f64(&quantized), expected, allowed);
    c.same_as_scalar(&format!("{name}, 16x4 layer"), &quantized, |k| outputs(k, Arithmetic::SixteenByFour));
}

/// An adapter as PEFT saved it.
pub(crate) fn adapter(config: &Value, file: &Tensors, key: &str, shape: [usize; 2]) -> LoRAAdapter {
    for pattern in ["rank_pattern", "alpha_pattern"] {
        assert!(config[pattern].as_object().is_none_or(serde_json::Map::is_empty), "{pattern} is not read here");
    }
    let tensor = |name: &str| file.get(&format!("base_model.model.{key}.{name}")).to_f32();
    let rank = usize::try_from(config["r"].as_u64().unwrap()).unwrap();
    let alpha = config["lora_alpha"].to_string().parse().unwrap();
    let scaling = if config["use_rslora"] == true { LoRAScaling::RsLoRA } else { LoRAScaling::Standard };
    let (a, b) = (tensor("lora_A.weight"), tensor("lora_B.weight"));
    let adapter = LoRAAdapter::from_parts(a, b, shape[0], shape[1], rank, alpha, scaling).unwrap();
    if config["use_dora"] == true { adapter.with_magnitude(tensor("lora_magnitude_vector")).unwrap() } else { adapter }
}

/// A layer with an adapter: outputs, gradients and the merged weight of module `name` in `io`.
pub(crate) fn with_adapter(
    c: &mut Checker,
    name: &str,
    layer: &Quantized,
    adapter: &LoRAAdapter,
    bias: Option<&[f32]>,
    io: &Tensors,
) {
    let make = |kernels: Kernels, arithmetic: Arithmetic| {
        let qlora = QLoRALayer::from_parts(owned(layer), adapter.clone()).unwrap();
        let qlora = qlora.with_kernels(kernels).with_arithmetic(arithmetic);
        match bias {
            Some(bias) => qlora.with_bias(bias.to_vec()).unwrap(),
            None => qlora,
        }
    };
    let part = |suffix: &str| format!("{name}.{suffix}");
    let (x, dy): (Vec<f32>, Vec<f32>) = (io.values(&part("x")), io.values(&part("dy")));
    let merged = io.values::<f32>(&part("merged_f32"));

    let y64 = part("y64");
    let outputs = |kernels: Kernels, arithmetic: Arithmetic| make(kernels, arithmetic).forward(&tensor(&x)).into_vec();
    check_outputs(c, &y64, layer, &x, &gains(layer, adapter), &io.values(&y64), &outputs);

    let gradients = |kernels: Kernels| {
        let mut qlora = make(kernels, Arithmetic::F32);
        let dx = qlora.backward(&tensor(&x), &tensor(&dy)).into_vec();
        let names = ["dA64", "dB64", "dmagnitude64"];
        let params = qlora.trainable_params();
        let grads = params.iter().map(|p| p.grad().unwrap().to_vec());
        [("dx64", dx)].into_iter().chain(names.into_iter().zip(grads)).collect::<Vec<_>>()
    };
    let of_scalar = gradients(Kernels::scalar());
    for ((suffix, got), (_, scalar)) in gradients(c.kernels).into_iter().zip(of_scalar) {
        close(c, &part(suffix), "gradient", &got, &io.values(&part(suffix)), GRADIENT_TOLERANCE);
        c.same_as_scalar(&part(suffix), &got, |_| scalar);
    }

    let got = make(c.kernels, Arithmetic::F32).merge_to_f32();
    close(c, &part("merged_f32"), "merged weight", &got, &to_f64(&merged), MERGED_TOLERANCE);
    c.same_as_scalar(&part("merged_f32"), &got, |k| make(k, Arithmetic::F32).merge_to_f32());
}

/// What `DoRA` multiplies the base product of each row by; 1 without it.
fn gains(layer: &Quantized, adapter: &LoRAAdapter) -> Vec<f64> {
    let Some(magnitude) = adapter.magnitude() else { return vec![1.0; layer.rows] };
    let weights = layer.dequantized(Kernels::scalar());
    let (a, b, rank) = (adapter.a().data(), adapter.b().data(), adapter.rank());
    let adapted = |row: usize, col: usize| -> f64 {
        let delta: f64 = (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * layer.cols + col])).sum();
        f64::from(weights[row * layer.cols + col]) + f64::from(adapter.scale()) * delta
    };
    let norm = |row: usize| (0..layer.cols).map(|col| adapted(row, col).powi(2)).sum::<f64>().sqrt();
    magnitude.data().iter().enumerate().map(|(row, m)| f64::from(*m) / norm(row)).collect()
}

/// `|got - expected|` is at most so large a fraction of the largest value.
pub(crate) fn close(c: &mut Checker, name: &str, measure: &'static str, got: &[f32], expected: &[f64], tolerance: f64) {
    let allowed = tolerance * largest(expected);
    c.within(name, measure, &to_f64(got), expected, |_| allowed);
}

pub(crate) fn tensor(values: &[f32]) -> nf4::Tensor {
    nf4::Tensor::from_vec(values.to_vec(), false)
}

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}
