//! Adapters that PEFT made, on bases that `bitsandbytes` quantized (`tests/data/reference/peft`).

use std::fs;
use std::path::Path;

use nf4::{AbsmaxBuf, Arithmetic, BlockSize, LoRAAdapter, LoRAScaling, QLoRALayer, Quantized4Bit, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::{all_kernels, truth};

const CASES: [(&str, LoRAScaling); 3] =
    [("rank1", LoRAScaling::Standard), ("rank8_nodq", LoRAScaling::Standard), ("rank16_rslora", LoRAScaling::RsLoRA)];

#[test]
fn forward_and_merge_agree_with_peft() {
    let kernels = all_kernels();
    for (case, scaling) in CASES {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/peft").join(case);
        let read = |file: &str| fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{case}/{file}: {e}"));
        let [base, adapter, io] = ["base", "adapter_model", "io"].map(|f| read(&format!("{f}.safetensors")));
        let [base, adapter, io] = [&base, &adapter, &io].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        let config: Value = serde_json::from_slice(&read("adapter_config.json")).unwrap();
        let alpha = config["lora_alpha"].to_string().parse().unwrap();
        let rank = usize::try_from(config["r"].as_u64().unwrap()).unwrap();

        for key in base.names().iter().filter_map(|n| n.strip_suffix(".weight")) {
            let module = key.strip_prefix("model.layers.0.").unwrap();
            let base_weight = base_weight(&base, key);
            let lora = |m: &str| f32s(&adapter, &format!("base_model.model.{key}.lora_{m}.weight"));
            let shape = [base_weight.rows(), base_weight.cols()];
            let lora = LoRAAdapter::from_parts(lora("A"), lora("B"), shape[0], shape[1], rank, alpha, scaling).unwrap();
            let mut layer = QLoRALayer::from_parts(base_weight, lora).unwrap();

            if base.names().contains(&&*format!("{key}.bias")) {
                layer = layer.with_bias(f32s(&base, &format!("{key}.bias"))).unwrap();
            }

            // `y64` comes from `W` and the adapter without any rounding but of f64.
            let y64 = f64s(&io, &format!("{module}.y64"));
            let largest_y = y64.iter().fold(0.0_f64, |m, y| m.max(y.abs()));
            let x = Tensor::from_vec(f32s(&io, &format!("{module}.x")), false);
            let merged = f32s(&io, &format!("{module}.merged_f32"));
            let largest = merged.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
            for k in &kernels {
                layer = layer.with_kernels(*k);
                layer = layer.with_arithmetic(Arithmetic::SixteenByFour);
                let y = layer.forward(&x);
                for ((x, y), y64) in x.data().chunks(shape[1]).zip(y.data().chunks(shape[0])).zip(y64.chunks(shape[0]))
                {
                    let mut expected = truth::forward(&layer, x);
                    for (e, y) in expected.iter_mut().zip(y64) {
                        // The scale is rounded to f32 here, and was not there.
                        e.bound += truth::EPS * e.exact.abs() * 2.0;
                        e.exact = *y;
                    }
                    truth::check(&format!("{case} {module} {}", k.isa()), &expected, y);
                }
                layer = layer.with_arithmetic(Arithmetic::F32);
                for (y, y64) in layer.forward(&x).data().iter().zip(&y64) {
                    // The tolerance that the reference recommends for f32 outputs.
                    assert!((f64::from(*y) - y64).abs() <= 2e-6 * largest_y, "{case} {module}: {y}, expected {y64}");
                }
                for (a, b) in layer.merge_to_f32().iter().zip(&merged) {
                    assert!((a - b).abs() <= 1e-6 * largest, "{case} {module}: merged {a}, expected {b}");
                }
            }
        }
    }
}

/// The quantized weight of the module `key` of a `bitsandbytes` state dict.
fn base_weight(file: &SafeTensors<'_>, key: &str) -> Quantized4Bit {
    let bytes = |name: &str| file.tensor(&format!("{key}.weight{name}")).unwrap().data().to_vec();
    let floats = |name: &str| f32s(file, &format!("{key}.weight{name}"));
    let state: Value = serde_json::from_slice(&bytes(".quant_state.bitsandbytes__nf4")).unwrap();
    let number = |v: &Value| usize::try_from(v.as_u64().unwrap()).unwrap();
    #[allow(clippy::cast_possible_truncation, reason = "the decimal is that of an f32")]
    let absmax = match state["nested_offset"].as_f64() {
        Some(offset) => {
            let map = floats(".nested_quant_map").try_into().unwrap();
            AbsmaxBuf::nested(bytes(".absmax"), floats(".nested_absmax"), &map, offset as f32).unwrap()
        }
        None => AbsmaxBuf::plain(floats(".absmax")),
    };
    let block_size = BlockSize::new(number(&state["blocksize"])).unwrap();
    let (rows, cols) = (number(&state["shape"][0]), number(&state["shape"][1]));
    Quantized4Bit::from_parts(bytes(""), absmax, rows, cols, block_size).unwrap()
}

fn f32s(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data();
    data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn f64s(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let data = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data();
    data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
}
