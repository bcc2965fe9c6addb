//! Files of 4-bit layers: an error, or layers that are consistent and are written again with the same bytes. No panic,
//! no memory for a number that a file only claims, and no time that grows faster than the file.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::checkpoint::{
    CheckpointError, FloatType, Linear4bit, MergeOptions, MergedModel, ModelConfig, QuantState, QuantizationConfig,
    TensorFile, TensorSource, foreign_tensors, packed_tensors, to_safetensors, write_gguf,
};
use nf4_fuzz::files::{LAYERS, changed, contents, measured, parts, tensors, text, with_header};
use nf4_fuzz::many::{self, timed};
use nf4_fuzz::{bits, others};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    /// What the bytes are: a whole file, a header, the description of the weight, changes of a file, a `config.json`, names
    /// of very many tensors.
    mode: u8,
    /// Which real file the rest comes from.
    base: u8,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let base = LAYERS[usize::from(input.base) % LAYERS.len()];
    match input.mode % 6 {
        0 => file(input.bytes),
        1 => file(&with_header(input.bytes, parts(base).1)),
        2 => {
            let mut tensors = tensors(base);
            let state = tensors.keys().find(|name| name.contains("quant_state")).cloned().expect("a 4-bit layer");
            tensors.insert(state.clone(), text(&state, input.bytes));
            model(&tensors, base.len() + input.bytes.len());
        }
        3 => file(&changed(base, input.bytes)),
        4 => config(input.bytes),
        _ => file(&many::tensors(&input.bytes[..input.bytes.len().min(16)])),
    }
});

fn file(bytes: &[u8]) {
    measured(bytes.len(), 0, || drop(TensorFile::parse(bytes)));
    let Ok(file) = TensorFile::parse(bytes) else { return };
    // A file with the same tensors has the same tensors. Types of less than a byte are read, and not written.
    match to_safetensors(&file) {
        Ok(again) => {
            let again = TensorFile::parse(&again).expect("what was written can be read");
            assert_eq!(contents(&again), contents(&file));
        }
        Err(error) => assert!(matches!(error, CheckpointError::Unexpected { .. }), "{error}"),
    }
    model(&file, bytes.len());
}

fn model(source: &dyn TensorSource, len: usize) {
    timed("a model", || check_model(source, len));
}

fn check_model(source: &dyn TensorSource, len: usize) {
    let packed = packed_tensors(source);
    for tensor in packed.iter().take(8) {
        let mut loaded = None;
        measured(len, 0, || loaded = Linear4bit::load_tensor(source, tensor).ok());
        let Some(loaded) = loaded else { continue };
        layer(&loaded);
        let state = QuantState::load(source, tensor).expect("it was loaded");
        assert_eq!(state.matrix_shape(), loaded.state().matrix_shape());
    }
    let foreign = foreign_tensors(source);
    assert!(foreign.iter().all(|tensor| !packed.contains(&tensor.name)));
    for float in [None, Some(FloatType::F32), Some(FloatType::F16), Some(FloatType::BF16)] {
        measured(len, 0, || {
            let options = float.map_or(MergeOptions::new(), |float| MergeOptions::new().with_dtype(float));
            let Ok(merged) = MergedModel::new(source, None, &options) else { return };
            assert!(foreign.is_empty(), "{foreign:?} would lose their description");
            for name in merged.names() {
                let info = merged.info(name).expect("it was named");
                if let Ok(bytes) = merged.read(name) {
                    assert_eq!(bytes.len() * 8, info.shape.iter().product::<usize>() * info.dtype.bitsize(), "{name}");
                }
            }
            let _ = write_gguf(&merged, "fuzz", &[], &mut |_| Ok(()));
        });
    }
}

/// The parts of a layer fit each other, its products are the same everywhere, and it survives being written.
fn layer(layer: &Linear4bit) {
    let weight = layer.weight();
    let [rows, cols] = layer.state().matrix_shape().expect("it was loaded");
    assert_eq!([weight.rows(), weight.cols()], [rows, cols]);
    assert!(layer.bias().is_none_or(|bias| bias.len() == rows && bias.iter().all(|b| b.is_finite())));
    let dequantized = weight.dequantize::<f32>();
    assert!(dequantized.iter().all(|w| w.is_finite()));
    if rows <= 1 << 16 {
        let product = |k: nf4::Kernels| {
            let mut y = vec![3.0; rows];
            k.gemv_f32(&weight.view(), &vec![1.0; cols], &mut y).expect("the lengths fit");
            bits(&y)
        };
        others().for_each(|k| assert_eq!(product(k), product(nf4::Kernels::scalar())));
    }

    let file = to_safetensors(&layer.tensors("x.y")).expect("a layer can be written");
    let file = TensorFile::parse(&file).expect("what was written can be read");
    let again = Linear4bit::load(&file, "x.y").expect("what was written can be loaded");
    assert_eq!(bits(&again.weight().dequantize::<f32>()), bits(&dequantized));
    assert_eq!(contents(&again.tensors("x.y")), contents(&file));
    assert_eq!(again.state(), layer.state());
}

fn config(bytes: &[u8]) {
    measured(bytes.len(), 0, || {
        if let Ok(Some(config)) = QuantizationConfig::from_config(bytes) {
            let text = config.insert_into(bytes).expect("an object");
            assert_eq!(QuantizationConfig::from_config(text.as_bytes()), Ok(Some(config)));
        }
        // A configuration is written with all that it says, and the written one is the same.
        if let Ok(config) = ModelConfig::parse(bytes) {
            let text = config.to_text().expect("an object");
            assert_eq!(ModelConfig::parse(text.as_bytes()), Ok(config));
        }
    });
}
