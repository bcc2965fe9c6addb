//! Quantizes the layers of a model and writes them, adapters for them and the merged model: files of `bitsandbytes`,
//! PEFT and GGUF. `tests/upstream/check.py` loads them with the real libraries.
//!
//!     cargo run --release --example write_checkpoint -- MODEL.safetensors OUT
//!
//! MODEL has dense Linear weights under the names that transformers gives them; OUT must not exist. In OUT:
//!
//! * `layer/NAME.safetensors`, one 4-bit layer each, and `layer/NAME.restored.safetensors`, the weight that this library
//!   dequantizes from it;
//! * `adapter/NAME/`, adapters for all attention and MLP layers;
//! * `NAME.safetensors` and `NAME.gguf`, the quantized model merged with the adapter `standard`, in f32, f16 and bf16.

extern crate alloc;

use alloc::collections::BTreeMap;
use core::error::Error;
use std::fs::{create_dir, create_dir_all, read, write};
use std::path::Path;

use nf4::checkpoint::{
    Dtype, FloatType, GgufValue, Linear4bit, MergeOptions, MergedModel, PeftAdapter, TensorData, TensorFile, TensorMap,
    TensorSource, to_safetensors, write_gguf,
};
use nf4::{BlockSize, LoRAAdapter, LoRAScaling, Quantized4Bit};

type Result<T> = core::result::Result<T, Box<dyn Error>>;

/// Dense weights by module, and their shapes.
type Weights = BTreeMap<String, (Vec<f32>, [usize; 2])>;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: write_checkpoint MODEL.safetensors OUT".into());
    };
    let out = Path::new(&out);
    create_dir(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let bytes = read(&model).map_err(|e| format!("{model}: {e}"))?;
    let file = TensorFile::parse(&bytes).map_err(|e| format!("{model}: {e}"))?;
    let weights = linear_weights(&file)?;

    write_layers(&out.join("layer"), &weights)?;
    let standard = write_adapters(&out.join("adapter"), &weights)?;
    write_merged(out, &file, &weights, &standard)
}

/// The weights of all attention and MLP layers.
fn linear_weights(file: &TensorFile<'_>) -> Result<Weights> {
    let mut weights = Weights::new();
    for (name, info) in file.header().iter() {
        let Some(module) = name.strip_suffix("_proj.weight").map(|m| m.to_owned() + "_proj") else { continue };
        let float = FloatType::from_dtype(info.dtype).ok_or_else(|| format!("{name}: type {}", info.dtype))?;
        let [rows, cols] = *info.shape else { return Err(format!("{name}: not a matrix").into()) };
        weights.insert(module, (float.values(&file.read(name)?), [rows, cols]));
    }
    if weights.is_empty() { Err("no weight is called ..._proj.weight".into()) } else { Ok(weights) }
}

/// One layer in every way to keep it.
fn write_layers(out: &Path, weights: &Weights) -> Result<()> {
    create_dir_all(out)?;
    let (weight, [rows, cols]) = weights.values().next().ok_or("no weight")?;
    let bias = |float: FloatType| (float, (0..*rows).map(|i| i as f32 * 0.25 - 1.0).collect::<Vec<f32>>());
    let cases = [
        ("plain", BlockSize::B64, false, FloatType::F32, Dtype::U8, None),
        ("nested", BlockSize::B64, true, FloatType::BF16, Dtype::U8, Some(bias(FloatType::BF16))),
        ("nested_as_bf16", BlockSize::B64, true, FloatType::F16, Dtype::BF16, Some(bias(FloatType::F32))),
        ("plain_as_f32", BlockSize::B128, false, FloatType::F32, Dtype::F32, Some(bias(FloatType::F16))),
        ("nested_32", BlockSize::B32, true, FloatType::F32, Dtype::U8, None),
        ("nested_256", BlockSize::B256, true, FloatType::F32, Dtype::U8, None),
        ("plain_4096", BlockSize::B4096, false, FloatType::F32, Dtype::U8, None),
    ];
    for (name, block_size, double_quant, dtype, storage, bias) in cases {
        let quantized = Quantized4Bit::quantize(weight, *rows, *cols, block_size, double_quant)?;
        let restored = quantized.dequantize::<f32>();
        let mut layer = Linear4bit::new(quantized, dtype).with_quant_storage(storage)?;
        if let Some((float, bias)) = bias {
            layer = layer.with_bias(bias, float)?;
        }
        write(out.join(format!("{name}.safetensors")), to_safetensors(&layer.tensors(""))?)?;
        let mut bytes = Vec::new();
        FloatType::F32.extend_bytes(&restored, &mut bytes);
        let restored = TensorData::new("weight", Dtype::F32, vec![*rows, *cols], bytes)?;
        let restored = TensorMap::from([("weight".to_owned(), restored)]);
        write(out.join(format!("{name}.restored.safetensors")), to_safetensors(&restored)?)?;
    }
    Ok(())
}

/// Adapters of each kind; the first one is returned.
fn write_adapters(out: &Path, weights: &Weights) -> Result<PeftAdapter> {
    let make = |rank: &dyn Fn(usize) -> usize, alpha: &dyn Fn(usize) -> f64, scaling, dora: bool| {
        let mut modules = Vec::new();
        for (i, (name, (weight, [rows, cols]))) in weights.iter().enumerate() {
            let mut adapter = LoRAAdapter::new(*rows, *cols, rank(i), alpha(i), scaling, i as u64)?;
            // B starts at zero; this is what training might make of it.
            adapter.b_mut().data_mut().iter_mut().enumerate().for_each(|(k, b)| *b = (k as f32 * 0.7).sin() * 0.1);
            if dora {
                let norm = |row: &[f32]| row.iter().map(|w| w * w).sum::<f32>().sqrt() * 1.1;
                adapter = adapter.with_magnitude(weight.chunks(*cols).map(norm).collect())?;
            }
            modules.push((name.clone(), adapter));
        }
        Ok::<_, Box<dyn Error>>(PeftAdapter::new(modules)?.with_field("task_type", "CAUSAL_LM".into()))
    };
    let standard = make(&|_| 8, &|_| 16.0, LoRAScaling::Standard, false)?;
    let rslora = make(&|i| 4 + i % 3, &|i| 8.0 + (i % 2) as f64 / 2.0, LoRAScaling::RsLoRA, false)?;
    let dora = make(&|_| 4, &|_| 8.0, LoRAScaling::Standard, true)?;
    for (name, adapter, float) in [
        ("standard", &standard, FloatType::F32),
        ("rslora_patterns_bf16", &rslora, FloatType::BF16),
        ("dora", &dora, FloatType::F32),
    ] {
        let (config, tensors) = adapter.to_files(float)?;
        let dir = out.join(name);
        create_dir_all(&dir)?;
        write(dir.join("adapter_config.json"), config)?;
        write(dir.join("adapter_model.safetensors"), tensors)?;
    }
    Ok(standard)
}

/// The model with 4-bit layers and the adapter merged into them.
fn write_merged(out: &Path, file: &TensorFile<'_>, weights: &Weights, adapter: &PeftAdapter) -> Result<()> {
    let mut layers = Vec::new();
    for (name, (weight, [rows, cols])) in weights {
        let quantized = Quantized4Bit::quantize(weight, *rows, *cols, BlockSize::B64, true)?;
        layers.push((name, Linear4bit::new(quantized, FloatType::F32)));
    }
    let mut model = TensorMap::new();
    for (name, info) in file.header().iter() {
        model.insert(name.to_owned(), TensorData::new(name, info.dtype, info.shape.clone(), file.read(name)?)?);
    }
    for (name, layer) in &layers {
        model.extend(layer.tensors(name));
    }
    for (name, float) in [("f32", FloatType::F32), ("f16", FloatType::F16), ("bf16", FloatType::BF16)] {
        let merged = MergedModel::new(&model, Some(adapter), &MergeOptions::new().with_dtype(float))?;
        write(out.join(format!("{name}.safetensors")), to_safetensors(&merged)?)?;
        let (mut gguf, title) = (Vec::new(), GgufValue::String("merged".to_owned()));
        write_gguf(&merged, "llama", &[("general.name", title)], &mut |bytes| {
            gguf.extend_from_slice(bytes);
            Ok(())
        })?;
        write(out.join(format!("{name}.gguf")), gguf)?;
    }
    Ok(())
}
