//! PEFT adapters: an error, or an adapter that is consistent, can be used, and is written again with the same bytes. No
//! panic, no memory for a number that a file only claims, and no time that grows faster than the files.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nf4::checkpoint::{
    FloatType, Linear4bit, MergeOptions, MergedModel, PeftAdapter, TensorData, TensorFile, TensorMap, TensorSource,
};
use nf4::{BlockSize, Quantized4Bit, Tensor};
use nf4_fuzz::files::{ADAPTERS, changed, contents, measured, parts, with_header};
use nf4_fuzz::many::{self, timed};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    /// What the bytes are: the configuration, the header of the tensors, changes of both files, both files, what stands
    /// very many times in both.
    mode: u8,
    /// Which real adapter the rest comes from.
    base: u8,
    /// Of two files, the length of the first.
    first: u16,
    bytes: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let (config, file) = ADAPTERS[usize::from(input.base) % ADAPTERS.len()];
    let (first, second) = input.bytes.split_at(usize::from(input.first).min(input.bytes.len()));
    match input.mode % 6 {
        0 => adapter(input.bytes, file),
        1 => adapter(config, &with_header(input.bytes, parts(file).1)),
        2 => adapter(&changed(config, first), &changed(file, second)),
        3 => adapter(first, &with_header(second, parts(file).1)),
        4 => adapter(first, second),
        _ => {
            let (config, file) = many::adapter(input.bytes);
            load(config.as_bytes(), &file);
        }
    }
});

/// Whatever tensors of a module are replaced by others of any length, everything is an error or fits.
fn replaced(adapter: &PeftAdapter) {
    let Some((name, module)) = adapter.modules().next().map(|(name, module)| (name.to_owned(), module.adapter()))
    else {
        return;
    };
    for which in 0..3 {
        for len in [0, 1, module.a().len() + 1] {
            let mut lora = module.clone();
            let tensor = match which {
                0 => Some(lora.a_mut()),
                1 => Some(lora.b_mut()),
                _ => lora.magnitude_mut(),
            };
            let Some(tensor) = tensor.filter(|tensor| tensor.len() != len) else { continue };
            *tensor = Tensor::zeros(len, true);
            assert!(PeftAdapter::new([(name.clone(), lora.clone())]).is_err());
            assert!(adapter.clone().replace(&name, lora).is_err());
        }
    }
}

/// What the expressions of the two patterns may take when they are compiled: each field at most 64 MiB.
const PATTERNS: u64 = 2 << 26;

fn load(config: &[u8], file: &[u8]) -> Option<PeftAdapter> {
    let file = TensorFile::parse(file).ok()?;
    let len = config.len() + file.header().data_len() + 200 * file.header().iter().count();
    let mut loaded = None;
    timed("loading", || measured(len, PATTERNS, || loaded = PeftAdapter::load(config, &file).ok()));
    loaded
}

fn adapter(config: &[u8], file: &[u8]) {
    let Some(adapter) = load(config, file) else { return };
    replaced(&adapter);

    let (text, tensors) = adapter.to_files(FloatType::F32).expect("an adapter from a file can be written");
    let tensors = TensorFile::parse(&tensors).expect("what was written can be read");
    let again =
        PeftAdapter::load(text.as_bytes(), &tensors).unwrap_or_else(|e| panic!("written, not loaded: {e}\n{text}"));
    assert_eq!(contents(&again.tensors(FloatType::F32).expect("as before")), contents(&tensors));
    assert_eq!(again.config().to_json(), text);

    // A base that it fits, packed and dense.
    let (mut packed, mut dense) = (TensorMap::new(), TensorMap::new());
    for (name, module) in adapter.modules() {
        let (part, alpha) = (module.adapter(), again.module(name).expect("it was written").adapter().scale());
        assert_eq!(part.scale().to_bits(), alpha.to_bits(), "scale of {name}");
        let (d_out, d_in) = (part.d_out(), part.d_in());
        if d_out.saturating_mul(d_in) > 1 << 14 || d_out.max(d_in) > 1 << 14 {
            return;
        }
        let weights: Vec<f32> = (0..d_out * d_in).map(|i| (i % 17) as f32 - 8.0).collect();
        let base = Quantized4Bit::quantize(&weights, d_out, d_in, BlockSize::B64, false).expect("finite weights");
        let base = Linear4bit::new(base, FloatType::F32).with_bias(vec![0.5; d_out], FloatType::F32).expect("finite");
        if let Ok(layer) = adapter.layer(name, base.clone()) {
            let y = layer.forward(&Tensor::from_vec(vec![0.5; d_in], false));
            assert_eq!((y.len(), layer.merge_to_f32().len()), (d_out, d_out * d_in));
        }
        packed.extend(base.tensors(name).into_iter().map(|(name, tensor)| {
            let bytes = tensor.bytes().to_vec();
            (name.clone(), TensorData::new(&name, tensor.dtype(), tensor.shape().to_vec(), bytes).expect("a copy"))
        }));
        let shape = if adapter.config().fan_in_fan_out() { vec![d_in, d_out] } else { vec![d_out, d_in] };
        let mut add = |part: &str, values: &[f32], shape| {
            let (name, mut bytes) = (format!("{name}.{part}"), Vec::new());
            FloatType::F32.extend_bytes(values, &mut bytes);
            dense.insert(name.clone(), TensorData::new(&name, FloatType::F32.dtype(), shape, bytes).expect("it fits"));
        };
        add("weight", &weights, shape);
        add("bias", &vec![0.5; d_out], vec![d_out]);
    }
    for base in [&packed, &dense] {
        let Ok(merged) = MergedModel::new(base, Some(&adapter), &MergeOptions::new()) else { continue };
        for name in merged.names() {
            if let Ok(bytes) = merged.read(name) {
                let info = merged.info(name).expect("it was named");
                assert_eq!(bytes.len() * 8, info.shape.iter().product::<usize>() * info.dtype.bitsize(), "{name}");
            }
        }
    }
}
