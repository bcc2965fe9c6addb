//! What is written is read again, bit for bit: every block size, storage type, bias type and shape.

use nf4::checkpoint::{
    CheckpointError, Dtype, FloatType, Linear4bit, MergeOptions, MergedModel, QuantState, QuantizationConfig,
    TensorData, TensorFile, TensorMap, to_safetensors,
};
use nf4::{Absmax, AbsmaxBuf, BlockSize, DYNAMIC_MAP, Quantized4Bit};

use crate::tensor;

fn quantized(rows: usize, cols: usize, block_size: BlockSize, double_quant: bool) -> Quantized4Bit {
    let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
    Quantized4Bit::quantize(&weights, rows, cols, block_size, double_quant).unwrap()
}

/// Writes and reads, and compares all that a layer has.
fn round_trip(layer: &Linear4bit) -> Linear4bit {
    let file = to_safetensors(&layer.tensors("a.b")).unwrap();
    let again = Linear4bit::load(&TensorFile::parse(&file).unwrap(), "a.b").unwrap();
    assert_eq!(again.state(), layer.state());
    assert_eq!(again.bias(), layer.bias());
    assert_eq!(again.weight().packed(), layer.weight().packed());
    let bits = |l: &Linear4bit| l.weight().dequantize::<f32>().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&again), bits(layer));
    assert!(to_safetensors(&again.tensors("a.b")).unwrap() == file);
    again
}

#[test]
fn every_block_size_plain_and_nested() {
    for block_size in BlockSize::ALL {
        for double_quant in [false, true] {
            for (rows, cols) in [(0, 0), (1, 1), (3, 33), (5, 64), (40, 512), (70, 4096)] {
                let weight = quantized(rows, cols, block_size, double_quant);
                let layer = round_trip(&Linear4bit::new(weight, FloatType::BF16));
                assert_eq!(layer.state().nested_offset.is_some(), double_quant);
            }
        }
    }
}

#[test]
fn every_storage_type() {
    let weight = quantized(8, 64, BlockSize::B64, true);
    for dtype in [Dtype::U8, Dtype::I8, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64] {
        let layer = Linear4bit::new(weight.clone(), FloatType::F16).with_quant_storage(dtype).unwrap();
        assert_eq!(layer.tensors("")["weight"].shape(), [256 * 8 / dtype.bitsize(), 1]);
        assert_eq!(round_trip(&layer).state().quant_storage, dtype);
    }
    let odd = Linear4bit::new(quantized(3, 3, BlockSize::B64, false), FloatType::F32);
    let error = odd.clone().with_quant_storage(Dtype::BF16).unwrap_err().to_string();
    assert!(error.contains("BF16") && error.contains("expected 6 bytes, got 5"), "{error}");
    assert!(odd.with_quant_storage(Dtype::F4).unwrap_err().to_string().contains("F4"));
}

#[test]
fn every_bias_type() {
    for float in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        let layer = Linear4bit::new(quantized(3, 64, BlockSize::B64, false), FloatType::F32);
        let layer = layer.with_bias(vec![0.5, -1.25, 3.0], float).unwrap();
        assert_eq!(layer.tensors("x")["x.bias"].dtype(), float.dtype());
        round_trip(&layer);
    }
    let file = to_safetensors(&Linear4bit::new(quantized(3, 64, BlockSize::B64, false), FloatType::F32).tensors("x"));
    let file = file.unwrap();
    let file = TensorFile::parse(&file).unwrap();
    let mut tensors: TensorMap<'_> = TensorMap::new();
    for (name, info) in file.header().iter() {
        let bytes = nf4::checkpoint::TensorSource::read(&file, name).unwrap();
        tensors.insert(name.to_owned(), TensorData::new(name, info.dtype, info.shape.clone(), bytes).unwrap());
    }
    let doubles: Vec<u8> = [0.1_f64, 0.2, 0.3].iter().flat_map(|x| x.to_le_bytes()).collect();
    tensors.insert("x.bias".to_owned(), TensorData::new("x.bias", Dtype::F64, vec![3], doubles).unwrap());
    assert_eq!(Linear4bit::load(&tensors, "x").unwrap().bias().unwrap(), [0.1, 0.2, 0.3]);
}

/// A second quant map other than this library's own is used and written again.
#[test]
fn the_nested_map_of_the_file_counts() {
    let weight = quantized(16, 64, BlockSize::B32, true);
    let Absmax::Nested(nested) = weight.absmax().view() else { panic!("nested") };
    let map = DYNAMIC_MAP.map(|x| f32::from_bits(x.to_bits() ^ 1));
    let absmax = AbsmaxBuf::nested(nested.codes().to_vec(), nested.absmax().to_vec(), &map, nested.offset()).unwrap();
    let other = Quantized4Bit::from_parts(weight.packed().to_vec(), absmax, 16, 64, BlockSize::B32).unwrap();
    let again = round_trip(&Linear4bit::new(other, FloatType::F32));
    let Absmax::Nested(nested) = again.weight().absmax().view() else { panic!("nested") };
    assert_eq!(nested.quant_map(), &map);
}

/// Shapes of other than two dimensions, which `Params4bit` may have.
#[test]
fn every_number_of_dimensions() {
    for (shape, rows, cols) in [("[]", 1, 1), ("[96]", 1, 96), ("[2, 3, 16]", 6, 16), ("[2, 3, 4, 4]", 24, 4)] {
        let layer = Linear4bit::new(quantized(rows, cols, BlockSize::B64, false), FloatType::F32);
        let mut tensors = layer.tensors("");
        let state = "weight.quant_state.bitsandbytes__nf4";
        let text = String::from_utf8(tensors[state].bytes().to_vec()).unwrap();
        let text = text.replace(&format!("[{rows}, {cols}]"), shape);
        tensors
            .insert(state.to_owned(), TensorData::new(state, Dtype::U8, vec![text.len()], text.into_bytes()).unwrap());
        let again = Linear4bit::load(&tensors, "").unwrap();
        assert_eq!((again.weight().rows(), again.weight().cols()), (rows, cols), "{shape}");
        assert!(to_safetensors(&again.tensors("")).unwrap() == to_safetensors(&tensors).unwrap(), "{shape}");
    }
}

/// The offset is a decimal: its digits are those of Python's `repr`, and give the f32 back.
/// The fields are public, so they may have any value.
#[test]
fn shapes_that_overflow_are_errors() {
    let mut state = Linear4bit::new(quantized(4, 64, BlockSize::B64, false), FloatType::F32).state().clone();
    for (shape, expected) in [
        (vec![], Some([1, 1])),
        (vec![5], Some([1, 5])),
        (vec![2, 3, 5], Some([6, 5])),
        (vec![1 << (usize::BITS / 2); 3], None),
        (vec![usize::MAX, 2], None),
        (vec![usize::MAX, 2, 0], None),
        (vec![usize::MAX, 1], Some([usize::MAX, 1])),
    ] {
        state.shape = shape;
        match (state.matrix_shape(), expected) {
            (Ok(got), Some(expected)) => assert_eq!(got, expected),
            (Err(CheckpointError::Overflow { shape, .. }), None) => assert_eq!(shape, state.shape),
            (got, _) => panic!("{:?}: {got:?}", state.shape),
        }
    }
}

#[test]
fn the_offset_is_written_as_python_does() {
    for (offset, text) in [
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.0, "1.0"),
        (0.1, "0.10000000149011612"),
        (0.317_749_02, "0.3177490234375"),
        (1e-4, "9.999999747378752e-05"),
        (f32::from_bits(0x3900_0000), "0.0001220703125"),
        (1.5e-7, "1.500000053056283e-07"),
        (f32::from_bits(1), "1.401298464324817e-45"),
        (-3.0e10, "-30000001024.0"),
        (1e16, "1.0000000272564224e+16"),
        (8_589_934_592.0, "8589934592.0"),
        (f32::MAX, "3.4028234663852886e+38"),
    ] {
        let absmax = AbsmaxBuf::nested(vec![0], vec![0.0], &DYNAMIC_MAP, offset).unwrap();
        let weight = Quantized4Bit::from_parts(vec![0x77; 32], absmax, 1, 64, BlockSize::B64).unwrap();
        let layer = Linear4bit::new(weight, FloatType::F32);
        let tensors = layer.tensors("");
        let json = core::str::from_utf8(tensors["weight.quant_state.bitsandbytes__nf4"].bytes()).unwrap();
        assert!(json.ends_with(&format!("\"nested_offset\": {text}}}")), "{json}");
        let read = QuantState::load(&tensors, "weight").unwrap().nested_offset.unwrap();
        assert_eq!(read.to_bits(), offset.to_bits());
    }
}

#[test]
fn the_section_of_config_json() {
    let mut config = QuantizationConfig::default();
    config.double_quant = true;
    config.compute_dtype = FloatType::BF16;
    config.quant_storage = Dtype::F16;
    config.skip_modules = Some(vec!["lm_head".to_owned()]);
    let text = config.insert_into(br#"{"z": 1e-6, "model_type": "llama", "quantization_config": null}"#).unwrap();
    assert_eq!(QuantizationConfig::from_config(text.as_bytes()).unwrap(), Some(config));
    assert!(
        text.starts_with("{\n  \"model_type\": \"llama\",\n  \"quantization_config\": {\n    \"_load_in_4bit\""),
        "{text}"
    );
    let options = MergeOptions::new().with_dtype(FloatType::BF16).with_config(text.as_bytes());
    let text = MergedModel::new(&TensorMap::new(), None, &options).unwrap().config().unwrap().unwrap();
    assert_eq!(text, "{\n  \"dtype\": \"bfloat16\",\n  \"model_type\": \"llama\",\n  \"z\": 1e-6\n}\n");
    assert_eq!(QuantizationConfig::from_config(text.as_bytes()).unwrap(), None);
    let eight_bit = br#"{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}"#;
    assert_eq!(QuantizationConfig::from_config(eight_bit).unwrap(), None);
}

/// Tensors of any type go through a file unchanged.
#[test]
fn a_file_of_other_tensors() {
    let tensors = TensorMap::from([
        tensor("b", FloatType::F32, &[2, 0, 3], 1.0),
        tensor("a", FloatType::BF16, &[3], 1.0),
        ("c".to_owned(), TensorData::new("c", Dtype::BOOL, vec![2], vec![0, 1]).unwrap()),
    ]);
    let file = to_safetensors(&tensors).unwrap();
    let parsed = TensorFile::parse(&file).unwrap();
    assert_eq!(parsed.header().metadata()["format"], "pt");
    assert_eq!(parsed.header().file_range("c").unwrap(), file.len() as u64 - 2..file.len() as u64);
    let theirs = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(theirs.tensor("c").unwrap().data(), [0, 1]);
    assert_eq!(theirs.len(), 3);
}
