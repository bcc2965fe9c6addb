//! Weights of bitsandbytes where they lie, and adapters of PEFT.

#![allow(clippy::unwrap_used, reason = "tests end at the first surprise")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarMap};
use nf4::checkpoint::{FloatType, Linear4bit, SharedFile, TensorFile, TensorSource, to_safetensors};
use nf4::{Arithmetic, BlockSize, LoRAAdapter, LoRAScaling, Quantized4Bit};
use nf4_candle::{Nf4Linear, QLoRALinear, load_peft, peft_adapter, save_peft};

const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/reference/peft");
const NAME: &str = "model.layers.0.self_attn.q_proj";

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn adapters_of_peft_are_read_and_written() {
    for (case, parts) in [("rank8_nodq", 2), ("rank16_rslora", 2), ("rank8_dora", 3)] {
        read_and_write(&Path::new(REFERENCE).join(case), parts);
    }
}

/// Reads, changes, writes and reads an adapter whose modules have so many tensors.
fn read_and_write(reference: &Path, parts: usize) {
    let file = SharedFile::parse(Arc::new(fs::read(reference.join("base.safetensors")).unwrap())).unwrap();
    let (weight, bias) = Linear4bit::load(&file, NAME).unwrap().into_parts();
    let peft = load_peft(reference).unwrap();
    let adapter = peft.module(NAME).unwrap().adapter();
    let layer = QLoRALinear::new(NAME, weight.clone(), bias.clone(), adapter, &VarMap::new()).unwrap();

    // As the library has it.
    let x: Vec<f32> = (0..2 * weight.cols()).map(|i| (i as f32 * 0.37).sin()).collect();
    let expected = peft.layer(NAME, Linear4bit::load(&file, NAME).unwrap()).unwrap();
    let expected = expected.forward(&nf4::Tensor::from_vec(x.clone(), false));
    let x = Tensor::from_vec(x, (2, weight.cols()), &Device::Cpu).unwrap();
    assert_eq!(flat(&layer.forward(&x).unwrap()), expected.data());

    // Changed, written, and read again.
    let var = VarMap::new();
    let layer = QLoRALinear::new(NAME, weight.clone(), bias.clone(), adapter, &var).unwrap();
    for var in var.all_vars() {
        var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("new/adapter");
    save_peft(&peft_adapter([&layer]).unwrap(), &out, FloatType::F32).unwrap();
    let back = load_peft(&out).unwrap();
    assert_eq!(back.config().is_dora(), parts == 3);
    let read = QLoRALinear::new(NAME, weight, bias, back.module(NAME).unwrap().adapter(), &VarMap::new()).unwrap();
    assert_eq!(flat(&read.forward(&x).unwrap()), flat(&layer.forward(&x).unwrap()));
    assert_eq!(names(&out), ["adapter_config.json", "adapter_model.safetensors"]);

    // Over what is there; and the names of the variables are those of the file.
    save_peft(&back, &out, FloatType::F32).unwrap();
    let bytes = fs::read(out.join("adapter_model.safetensors")).unwrap();
    let file = TensorFile::parse(&bytes).unwrap();
    let mut keys: Vec<String> = var.data().lock().unwrap().keys().cloned().collect();
    keys.sort();
    let mut stored: Vec<&str> = file.header().iter().map(|(name, _)| name).collect();
    stored.sort_unstable();
    assert_eq!(keys, stored);
    assert_eq!(stored.len(), parts);
}

/// Outputs and gradients that PEFT computed in float64. The tolerance is that of the library's own test of its gradients: 3e-6
/// of the largest value.
#[test]
fn gradients_of_dora_are_those_of_peft() {
    let folder = Path::new(REFERENCE).join("rank8_dora");
    let read = |name: &str| SharedFile::parse(Arc::new(fs::read(folder.join(name)).unwrap())).unwrap();
    let (base, io, peft) = (read("base.safetensors"), read("io.safetensors"), load_peft(&folder).unwrap());
    for (module, peft) in peft.modules() {
        let short = module.strip_prefix("model.layers.0.").unwrap();
        let bytes = |part: &str| io.read(&format!("{short}.{part}")).unwrap();
        let floats = |part: &str| -> Vec<f32> {
            bytes(part).as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
        };
        let check = |part: &str, got: &Tensor| {
            let expected: Vec<f64> = bytes(part).as_chunks().0.iter().map(|value| f64::from_le_bytes(*value)).collect();
            let largest = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
            let got = flat(got);
            assert_eq!(got.len(), expected.len(), "{module}.{part}");
            for (got, expected) in got.iter().zip(expected) {
                let error = (f64::from(*got) - expected).abs();
                assert!(error <= 3e-6 * largest, "{module}.{part}: {got} for {expected}, largest {largest}");
            }
        };
        let (weight, bias) = Linear4bit::load(&base, module).unwrap().into_parts();
        let (d_out, d_in) = (weight.rows(), weight.cols());
        let layer = QLoRALinear::new(module, weight, bias, peft.adapter(), &VarMap::new()).unwrap();
        let layer = layer.with_arithmetic(Arithmetic::F32);
        let x = Var::from_vec(floats("x"), (5, d_in), &Device::Cpu).unwrap();
        let y = layer.forward(&x).unwrap();
        check("y64", &y);
        let dy = Tensor::from_vec(floats("dy"), (5, d_out), &Device::Cpu).unwrap();
        let gradients = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        check("dx64", gradients.get(&x).unwrap());
        for (part, variable) in ["dA64", "dB64", "dmagnitude64"].into_iter().zip(layer.variables()) {
            check(part, gradients.get(variable).unwrap());
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn files_that_are_not_adapters_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let error = |path: &Path| load_peft(path).unwrap_err().to_string();
    assert!(error(directory.path()).contains("adapter_config.json"));
    fs::write(directory.path().join("adapter_config.json"), "{").unwrap();
    assert!(error(directory.path()).contains("adapter_model.safetensors"));
    fs::write(directory.path().join("adapter_model.safetensors"), "no").unwrap();
    assert!(error(directory.path()).contains(&directory.path().display().to_string()));
}

#[test]
fn weights_of_a_mapped_file_are_not_copied() {
    let values: Vec<f32> = (0..64 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
    for double_quant in [false, true] {
        let weight = Quantized4Bit::quantize(&values, 64, 256, BlockSize::B64, double_quant).unwrap();
        let bytes = to_safetensors(&Linear4bit::new(weight.clone(), FloatType::F32).tensors("layer")).unwrap();
        let bytes: nf4::SharedBytes = Arc::new(bytes);
        let file = SharedFile::parse(bytes.clone()).unwrap();
        let load = || Linear4bit::load(&file, "layer").unwrap();
        let frozen = Nf4Linear::from_checkpoint(load()).unwrap();
        let adapter = LoRAAdapter::new(64, 256, 2, 2.0, LoRAScaling::Standard, 0).unwrap();
        let trained = QLoRALinear::new("layer", load().into_parts().0, None, &adapter, &VarMap::new()).unwrap();
        let inside = (*bytes).as_ref().as_ptr_range();
        for weight in [frozen.weight(), trained.weight()] {
            assert!(inside.contains(&weight.packed().as_ptr()));
        }
        // The layers keep the file alive, and give what owned weights give.
        drop(file);
        let owned = QLoRALinear::new("layer", weight, None, &adapter, &VarMap::new()).unwrap();
        let x = Tensor::ones((3, 256), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(flat(&owned.forward(&x).unwrap()), flat(&trained.forward(&x).unwrap()));
        assert_eq!(flat(&owned.forward(&x).unwrap()), flat(&frozen.forward(&x).unwrap()));
    }
}
