//! `Linear4bit` layers and whole models of the reference data.

use std::path::{Path, PathBuf};

use nf4::checkpoint::{
    Linear4bit, QuantizationConfig, TensorData, TensorFile, TensorMap, TensorSource, packed_tensors, to_safetensors,
};

use crate::support::{Case, Checker, Tensors, Tree, check_kind};

/// Every `model.safetensors` and `base.safetensors` of the reference data.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for case in Tree::open().cases {
        let name = match case.kind() {
            "linear4bit" | "checkpoint" => "model.safetensors",
            "peft" => "base.safetensors",
            _ => continue,
        };
        files.push(case.path_of(name));
    }
    assert!(!files.is_empty());
    files
}

/// All tensors of a file but those of its 4-bit layers.
fn others<'a>(file: &'a TensorFile<'_>, layers: &[(String, Linear4bit)]) -> TensorMap<'a> {
    let of_layers: Vec<String> = layers.iter().flat_map(|(prefix, l)| l.tensors(prefix).into_keys()).collect();
    let rest = file.header().iter().filter(|(name, _)| !of_layers.iter().any(|n| n == name));
    rest.map(|(name, info)| {
        let data = TensorData::new(name, info.dtype, info.shape.clone(), file.read(name).unwrap()).unwrap();
        (name.to_owned(), data)
    })
    .collect()
}

#[test]
fn writes_the_bytes_that_bitsandbytes_wrote() {
    for path in files() {
        let bytes = std::fs::read(&path).unwrap();
        let file = TensorFile::parse(&bytes).unwrap();
        let layers: Vec<(String, Linear4bit)> = packed_tensors(&file)
            .into_iter()
            .map(|tensor| {
                let prefix = tensor.strip_suffix("weight").unwrap().trim_end_matches('.').to_owned();
                let layer = Linear4bit::load(&file, &prefix).unwrap();
                (prefix, layer)
            })
            .collect();
        assert!(!layers.is_empty(), "{}", path.display());
        let mut tensors = others(&file, &layers);
        for (prefix, layer) in &layers {
            tensors.extend(layer.tensors(prefix));
        }
        assert!(to_safetensors(&tensors).unwrap() == bytes, "{}: other bytes", path.display());
    }
}

/// Restored weights and bias against those of `bitsandbytes`.
fn check(c: &mut Checker, model: &Path, weights: &Tensors, names: &[(String, String)]) {
    let bytes = std::fs::read(model).unwrap();
    let file = TensorFile::parse(&bytes).unwrap();
    for (prefix, weight) in names {
        let layer = Linear4bit::load(&file, prefix).unwrap();
        c.dequantized(weight, &layer.weight().view(), weights.get(weight));
        let raw = Tensors::load(model);
        let bias = raw.find(&if prefix.is_empty() { "bias".to_owned() } else { format!("{prefix}.bias") });
        c.holds(prefix, layer.bias().map(<[f32]>::to_vec) == bias.map(|b| b.to_f32()), || "another bias".to_owned());
    }
}

#[test]
fn linear4bit() {
    check_kind("linear4bit", |c: &mut Checker, case: &Case| {
        let io = case.tensors_in("io.safetensors");
        let names: Vec<_> = io.iter().filter(|(name, _)| name.starts_with("weight_dequantized")).collect();
        let names: Vec<_> = names.into_iter().map(|(name, _)| (String::new(), name.to_owned())).collect();
        check(c, &case.path_of("model.safetensors"), &io, &names);
    });
}

#[test]
fn checkpoint() {
    check_kind("checkpoint", |c: &mut Checker, case: &Case| {
        let layers = case.info["layers"].as_array().unwrap();
        let names: Vec<_> = layers
            .iter()
            .map(|name| {
                let name = name.as_str().unwrap();
                (name.to_owned(), format!("{name}.weight_dequantized_f32"))
            })
            .collect();
        let model = case.path_of("model.safetensors");
        check(c, &model, &case.tensors_in("io.safetensors"), &names);

        let config = std::fs::read(model.with_file_name("config.json")).unwrap();
        let parsed = QuantizationConfig::from_config(&config).unwrap().unwrap();
        let written = parsed.insert_into(&config).unwrap();
        let [config, written]: [serde_json::Value; 2] =
            [&config, written.as_bytes()].map(|text| serde_json::from_slice(text).unwrap());
        c.holds("config.json", config == written, || format!("{written}"));
    });
}
