//! `verify`: what is wrong is found, named, and gives status 3.

use nf4::checkpoint::{FloatType, TensorData, TensorMap};
use nf4::{AbsmaxBuf, BlockSize, Quantized4Bit};
use tempfile::tempdir;

use crate::files::{add, save, weights};
use crate::run::{json, nf4};

/// Runs `verify`, which must find something and name all of `parts`.
fn finds(args: &[&str], parts: &[&str]) {
    let outcome = nf4(&[&["verify"], args].concat());
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    for part in parts {
        assert!(outcome.stdout.contains(part), "{part:?} is not in {:?}", outcome.stdout);
    }
    let outcome = nf4(&[&["--json", "verify"], args].concat());
    assert_eq!(outcome.code, Some(3));
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(report["good"], false);
    assert!(!report["findings"].as_array().unwrap().is_empty());
}

fn layer(values: &[f32], nested: bool) -> TensorMap<'static> {
    let weight = Quantized4Bit::quantize(values, 64, 64, BlockSize::B64, nested).unwrap();
    let layer = nf4::checkpoint::Linear4bit::new(weight, FloatType::F32);
    let owned = |(name, t): (String, TensorData<'_>)| {
        let tensor = TensorData::new(&name, t.dtype(), t.shape().to_vec(), t.bytes().to_vec()).unwrap();
        (name, tensor)
    };
    layer.tensors("a").into_iter().map(owned).collect()
}

#[test]
fn values_that_are_not_finite() {
    let root = tempdir().unwrap();
    let path = root.path().join("model.safetensors");
    let mut values = weights(&[64, 64], 1);
    (values[3], values[70], values[71]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let mut map = TensorMap::new();
    add(&mut map, "norm.weight", FloatType::BF16, &[64, 64], &values);
    save(&path, &map);
    finds(&[path.to_str().unwrap()], &["norm.weight: 1 NaN, 2 infinite"]);

    let mut map = layer(&weights(&[64, 64], 1), false);
    let mut absmax = FloatType::F32.values(map["a.weight.absmax"].bytes());
    absmax[7] = f32::NAN;
    add(&mut map, "a.weight.absmax", FloatType::F32, &[64], &absmax);
    save(&path, &map);
    finds(&[path.to_str().unwrap()], &["a.weight", "7", "NaN"]);
}

#[test]
fn parts_that_are_missing_or_do_not_fit() {
    let root = tempdir().unwrap();
    let path = root.path().join("model.safetensors");
    for nested in [false, true] {
        let good = layer(&weights(&[64, 64], 1), nested);
        save(&path, &good);
        json(&["verify", path.to_str().unwrap()]);
        for name in good.keys() {
            let mut map = good.clone();
            map.remove(name);
            save(&path, &map);
            finds(&[path.to_str().unwrap()], &[name]);
            let mut map = good.clone();
            add(&mut map, name, FloatType::F32, &[3], &[1.0, 2.0, 3.0]);
            save(&path, &map);
            finds(&[path.to_str().unwrap()], &[name]);
        }
    }
}

#[test]
fn comparisons() {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let values = weights(&[64, 64], 1);
    let mut dense = TensorMap::new();
    add(&mut dense, "a.weight", FloatType::F32, &[64, 64], &values);
    save(path("dense").as_ref(), &dense);
    let mut rounded = TensorMap::new();
    add(&mut rounded, "a.weight", FloatType::BF16, &[64, 64], &values);
    save(path("rounded").as_ref(), &rounded);
    for nested in [false, true] {
        save(path("packed").as_ref(), &layer(&values, nested));
        for dense in ["dense", "rounded"] {
            json(&["verify", &path("packed"), &path(dense)]);
            let report = json(&["verify", &path(dense), &path("packed")]);
            let compared = &report["tensors"][0]["compared"];
            assert!(compared["relative_rms_difference"].as_f64().unwrap() < 0.15, "{compared}");
        }
        json(&["verify", &path("packed"), &path("packed")]);
    }
    // One weight of another model.
    let mut other = values.clone();
    other[1234] = -0.5;
    add(&mut dense, "a.weight", FloatType::F32, &[64, 64], &other);
    save(path("other").as_ref(), &dense);
    save(path("packed").as_ref(), &layer(&values, false));
    save(path("packed-other").as_ref(), &layer(&other, false));
    finds(&[&path("dense"), &path("other")], &["a.weight: 1 values differ"]);
    finds(&[&path("packed"), &path("other")], &["a.weight: weight 1234"]);
    finds(&[&path("packed"), &path("packed-other")], &["a.weight", "values differ"]);
    // Another shape, other tensors.
    add(&mut dense, "a.weight", FloatType::F32, &[32, 128], &values);
    save(path("shape").as_ref(), &dense);
    finds(&[&path("packed"), &path("shape")], &["a.weight", "[64, 64]", "[32, 128]"]);
    let mut more = layer(&values, false);
    add(&mut more, "b.weight", FloatType::F32, &[1], &[1.0]);
    save(path("more").as_ref(), &more);
    finds(&[&path("packed"), &path("more")], &["b.weight: only in"]);
    finds(&[&path("more"), &path("packed")], &["no tensor b.weight"]);
    assert!(!AbsmaxBuf::plain(vec![1.0]).is_nested());
}
