//! Kinds `peft` and `sgd`: `LoRA` adapters on quantized layers, and a fine-tuning trace.

use crate::minilm::check_bit_sum;
use crate::support::{Case, Checker, NestedScales, Quantized, Scales, Tensors, quantize};
use crate::{layers, second_level, training};

/// Every layer of a PEFT case: its quantized base, and outputs, gradients and merged weight with its adapter.
pub(crate) fn peft(c: &mut Checker, case: &Case) {
    let [base, adapters, io] = ["base", "adapter_model", "io"].map(|f| case.tensors_in(&format!("{f}.safetensors")));
    let config = std::fs::read(case.path_of("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    for layer in case.info["layers"].as_array().unwrap() {
        let name = layer["name"].as_str().unwrap();
        let key = prefix_of(&base, name);
        let quantized = Quantized::from_state_dict(&base, &format!("{key}.weight"));
        let shape = [quantized.rows, quantized.cols].map(|d| u64::try_from(d).unwrap());
        let expected = [&layer["out"], &layer["in"]].map(|d| d.as_u64().unwrap());
        c.holds(name, shape == expected, || format!("shape: expected {expected:?}, got {shape:?}"));
        c.holds(name, quantized.block_size == case.block_size(), || format!("{:?}", quantized.block_size));
        let expected = case.info["dequantized_bit_sum"][name].as_u64();
        check_bit_sum(c, &format!("{name}: dequantized_bit_sum"), &quantized.dequantized(c.kernels), expected);

        let adapter = layers::adapter(&config, &adapters, key, [quantized.rows, quantized.cols]);
        let (scale, expected) = (adapter.scale(), case.info["scaling"][name].as_f64().unwrap());
        // Rounded once to f32.
        let off = (f64::from(scale) - expected).abs();
        c.holds(name, off <= 2.0_f64.powi(-24) * expected, || format!("scale: expected {expected}, got {scale}"));
        c.holds(name, adapter.is_dora() == (case.info["use_dora"] == true), || "DoRA".to_owned());
        let bias = base.find(&format!("{key}.bias")).map(|b| b.to_f32());
        layers::with_adapter(c, name, &quantized, &adapter, bias.as_deref(), &io);
    }
}

/// The full name of the module `name` in a checkpoint: `self_attn.q_proj` may be `model.layers.0.self_attn.q_proj`.
fn prefix_of<'a>(base: &'a Tensors, name: &str) -> &'a str {
    let mut found = base
        .iter()
        .filter_map(|(key, _)| key.strip_suffix(".weight"))
        .filter(|module| module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')));
    let module = found.next().unwrap_or_else(|| panic!("no module {name}"));
    assert_eq!(found.next(), None, "a second module {name}");
    module
}

/// The layer that is fine-tuned, and its training.
pub(crate) fn sgd(c: &mut Checker, case: &Case) {
    let file = case.tensors();
    let (rows, cols) = case.matrix_shape();
    let nested = NestedScales::from_reference(&file);
    let (packed, absmax) = quantize(c.kernels, file.get("w_original"), case.block_size());
    c.equal("packed", &packed, &file.values("packed"));
    second_level::quantized(c, &absmax, &nested);
    let layer = Quantized { packed, scales: Scales::Nested(nested), rows, cols, block_size: case.block_size() };
    c.dequantized("w_dequantized", &layer.matrix(), file.get("w_dequantized"));
    training::traces(c, case, &file, &layer);
}
