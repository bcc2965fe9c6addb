//! Merged models, as safetensors and as GGUF.

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, GgufValue, Linear4bit, MergeOptions, MergedModel, PeftAdapter, TensorData,
    TensorFile, TensorMap, TensorSource, to_safetensors, write_gguf,
};
use nf4::{BlockSize, Float, LoRAAdapter, LoRAScaling, Quantized4Bit, Tensor, bf16, f16};

use crate::support::{Case, Checker, check_kind};
use crate::tensor;

/// A 4-bit layer `m.q` `[70, 6]` with a bias, a dense layer `m.d` `[3, 5]`, a norm and an integer tensor.
fn base() -> TensorMap<'static> {
    let weights: Vec<f32> = (0..70 * 6).map(|i| (i as f32 * 0.37).sin()).collect();
    let weight = Quantized4Bit::quantize(&weights, 70, 6, BlockSize::B32, true).unwrap();
    let layer = Linear4bit::new(weight, FloatType::F32).with_bias(vec![0.5; 70], FloatType::F32).unwrap();
    let mut tensors: TensorMap<'static> = layer
        .tensors("m.q")
        .into_iter()
        .map(|(name, t)| {
            let data = TensorData::new(&name, t.dtype(), t.shape().to_vec(), t.bytes().to_vec()).unwrap();
            (name, data)
        })
        .collect();
    tensors.extend([
        tensor("m.d.weight", FloatType::BF16, &[3, 5], 0.125),
        tensor("m.norm.weight", FloatType::F32, &[6], 0.3),
        ("ids".to_owned(), TensorData::new("ids", Dtype::I64, vec![2], vec![7; 16]).unwrap()),
    ]);
    tensors
}

fn adapter() -> PeftAdapter {
    let lora = |d_out, d_in| {
        let values = |n: usize| (0..n).map(|i| (i as f32 * 0.7).cos()).collect();
        LoRAAdapter::from_parts(values(2 * d_in), values(2 * d_out), d_out, d_in, 2, 3.0, LoRAScaling::Standard)
            .unwrap()
    };
    PeftAdapter::new([("m.q".to_owned(), lora(70, 6)), ("m.d".to_owned(), lora(3, 5))]).unwrap()
}

fn bytes_of<T: Float, const N: usize>(values: &[f32], to_bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|x| to_bytes(T::from_f32(*x))).collect()
}

fn encoded(values: &[f32], float: FloatType) -> Vec<u8> {
    match float {
        FloatType::F32 => bytes_of(values, f32::to_le_bytes),
        FloatType::F16 => bytes_of(values, f16::to_le_bytes),
        FloatType::BF16 => bytes_of(values, bf16::to_le_bytes),
    }
}

#[test]
fn every_tensor_has_one_type_and_the_merged_values() {
    let (base, adapter) = (base(), adapter());
    let layer = adapter.layer("m.q", Linear4bit::load(&base, "m.q").unwrap()).unwrap();
    let pair = adapter.module("m.d").unwrap().adapter();
    let delta = |r: usize, c: usize| -> f64 {
        (0..2).map(|k| f64::from(pair.b().data()[r * 2 + k]) * f64::from(pair.a().data()[k * 5 + c])).sum()
    };
    #[allow(clippy::cast_possible_truncation, reason = "rounded once")]
    let dense: Vec<f32> =
        (0..15).map(|i| (f64::from(i as f32 + 1.0) * 0.125 + 1.5 * delta(i / 5, i % 5)) as f32).collect();
    for float in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        let merged = MergedModel::new(&base, Some(&adapter), &MergeOptions::new().with_dtype(float)).unwrap();
        let names: Vec<&str> = merged.names().collect();
        assert_eq!(names, ["ids", "m.d.weight", "m.norm.weight", "m.q.bias", "m.q.weight"]);
        let file = to_safetensors(&merged).unwrap();
        let file = TensorFile::parse(&file).unwrap();
        let is = |name: &str, dtype, shape: &[usize], bytes: &[u8]| {
            let info = file.header().get(name).unwrap();
            assert_eq!((info.dtype, &*info.shape), (dtype, shape), "{name}");
            assert!(file.read(name).unwrap() == bytes, "{name} as {float:?}");
        };
        is("m.q.weight", float.dtype(), &[70, 6], &encoded(&layer.merge_to_f32(), float));
        is("m.q.bias", float.dtype(), &[70], &encoded(&[0.5; 70], float));
        is("m.d.weight", float.dtype(), &[3, 5], &encoded(&dense, float));
        let norm: Vec<f32> = (1..=6).map(|i| i as f32 * 0.3).collect();
        is("m.norm.weight", float.dtype(), &[6], &encoded(&norm, float));
        is("ids", Dtype::I64, &[2], &[7; 16]);

        let plain = MergedModel::new(&base, None, &MergeOptions::new().with_dtype(float)).unwrap();
        let dequantized = Linear4bit::load(&base, "m.q").unwrap().weight().dequantize::<f32>();
        assert!(plain.read("m.q.weight").unwrap() == encoded(&dequantized, float));
    }
}

/// A tensor of an adapter can be replaced by one of any length.
#[test]
fn replaced_tensors_are_errors_wherever_the_adapter_is_used() {
    let replace: [(fn(&mut LoRAAdapter), &str); 4] = [
        (|l| *l.a_mut() = Tensor::zeros(1, true), "lora_a: expected 2 x 6 values, got 1"),
        (|l| *l.b_mut() = Tensor::zeros(0, true), "lora_b: expected 70 x 2 values, got 0"),
        (|l| *l.b_mut() = Tensor::zeros(141, true), "lora_b: expected 70 x 2 values, got 141"),
        (
            |l| *l.magnitude_mut().unwrap() = Tensor::zeros(69, true),
            "lora_magnitude_vector: expected length 70, got 69",
        ),
    ];
    let base = base();
    let layer = || Linear4bit::load(&base, "m.q").unwrap();
    for (replace, expected) in replace {
        let good = adapter().module("m.q").unwrap().adapter().clone().with_magnitude(vec![1.0; 70]).unwrap();
        let mut bad = good.clone();
        replace(&mut bad);
        let error = PeftAdapter::new([("m.q".to_owned(), bad.clone())]).unwrap_err();
        assert_eq!(error.to_string(), format!("m.q: {expected}"));
        let mut adapter = PeftAdapter::new([("m.q".to_owned(), good)]).unwrap();
        let error = adapter.replace("m.q", bad).unwrap_err();
        assert_eq!(error.to_string(), format!("m.q: {expected}"));
        // It is still the good one.
        adapter.tensors(FloatType::F32).unwrap();
        adapter.layer("m.q", layer()).unwrap();
        MergedModel::new(&base, Some(&adapter), &MergeOptions::new()).unwrap().read("m.q.weight").unwrap();
    }
}

#[test]
fn adapters_of_other_models_are_refused() {
    let mut without = base();
    without.remove("m.d.weight");
    let adapter = adapter();
    let error = MergedModel::new(&without, Some(&adapter), &MergeOptions::new()).unwrap_err();
    assert_eq!(error, CheckpointError::NotInModel { name: "m.d".to_owned(), nearest: Some("m.q".to_owned()) });
    without.extend([tensor("m.d.weight", FloatType::F32, &[5, 3], 1.0)]);
    let error = MergedModel::new(&without, Some(&adapter), &MergeOptions::new()).unwrap_err().to_string();
    assert!(error.contains("m.d") && error.contains("[5, 3]") && error.contains("[3, 5]"), "{error}");
}

/// Restored models of the reference, bit for bit.
#[test]
fn checkpoint() {
    check_kind("checkpoint", |c: &mut Checker, case: &Case| {
        let bytes = std::fs::read(case.path_of("model.safetensors")).unwrap();
        let file = TensorFile::parse(&bytes).unwrap();
        let io = case.tensors_in("io.safetensors");
        let restored = MergedModel::new(&file, None, &MergeOptions::new().with_dtype(FloatType::F32)).unwrap();
        c.holds("companions", restored.names().all(|n| !n.contains("quant")), || "there are some".to_owned());
        for name in case.info["layers"].as_array().unwrap() {
            let name = format!("{}.weight", name.as_str().unwrap());
            let values = FloatType::F32.values(&restored.read(&name).unwrap());
            c.equal(&name, &values, &io.values::<f32>(&format!("{name}_dequantized_f32")));
        }
    });
}

fn gguf(source: &dyn TensorSource, metadata: &[(&str, GgufValue)]) -> Result<Vec<u8>, CheckpointError> {
    let mut file = Vec::new();
    write_gguf(source, "llama", metadata, &mut |bytes| {
        file.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(file)
}

/// The format, byte by byte; `tests/upstream` reads such a file with the package `gguf`.
#[test]
fn gguf_has_the_layout_of_version_3() {
    let tensors = TensorMap::from([
        tensor("a.weight", FloatType::BF16, &[2, 3], 1.0),
        tensor("b", FloatType::F32, &[], 5.0),
        tensor("c", FloatType::F16, &[33], 1.0),
    ]);
    let file =
        gguf(&tensors, &[("general.name", GgufValue::String("x".to_owned())), ("n", GgufValue::F32(0.5))]).unwrap();
    let mut expected = b"GGUF".to_vec();
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    };
    expected.extend(3_u32.to_le_bytes());
    expected.extend(3_u64.to_le_bytes());
    expected.extend(4_u64.to_le_bytes());
    for (key, kind, value) in [
        ("general.architecture", 8_u32, &b"\x05\0\0\0\0\0\0\0llama"[..]),
        ("general.file_type", 4, &[1, 0, 0, 0]),
        ("general.name", 8, b"\x01\0\0\0\0\0\0\0x"),
        ("n", 6, &[0, 0, 0, 0x3f]),
    ] {
        text(&mut expected, key);
        expected.extend(kind.to_le_bytes());
        expected.extend(value);
    }
    for (name, dims, kind, offset) in
        [("a.weight", &[3_u64, 2][..], 30_u32, 0_u64), ("b", &[1], 0, 32), ("c", &[33], 1, 64)]
    {
        text(&mut expected, name);
        expected.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
        expected.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        expected.extend(kind.to_le_bytes());
        expected.extend(offset.to_le_bytes());
    }
    for name in ["a.weight", "b", "c"] {
        expected.resize(expected.len().next_multiple_of(32), 0);
        expected.extend(tensors[name].bytes());
    }
    expected.resize(expected.len().next_multiple_of(32), 0);
    assert!(file == expected);
}

#[test]
fn gguf_refuses_what_it_cannot_hold() {
    let error = |t: (String, TensorData<'static>)| gguf(&TensorMap::from([t]), &[]).unwrap_err().to_string();
    let long = "n".repeat(64);
    assert!(error(tensor(&long, FloatType::F32, &[1], 1.0)).contains("64 bytes"));
    assert!(error(tensor("a", FloatType::F32, &[1, 1, 1, 1, 1], 1.0)).contains("a: in GGUF, a shape [1, 1, 1, 1, 1]"));
    let integers = TensorData::new("i", Dtype::I64, vec![1], vec![0; 8]).unwrap();
    assert!(error(("i".to_owned(), integers)).contains("i: expected type F32, F16 or BF16 for GGUF, got I64"));
}
