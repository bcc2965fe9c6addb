//! Files of bitsandbytes and PEFT, and what the bytes of the fuzzer make of them.

use nf4::checkpoint::{Dtype, TensorData, TensorFile, TensorMap, TensorSource};

macro_rules! reference {
    ($path:literal) => {
        include_bytes!(concat!("../../tests/data/reference/", $path))
    };
}

/// Files with one 4-bit layer each.
pub const LAYERS: [&[u8]; 5] = [
    reference!("linear4bit/f32_nodq_odd/model.safetensors"),
    reference!("linear4bit/bf16_dq_f32compute/model.safetensors"),
    reference!("linear4bit/bf16_nodq_nobias/model.safetensors"),
    reference!("linear4bit/f16_dq_f32compute/model.safetensors"),
    reference!("linear4bit/f32_dq_bf16compute/model.safetensors"),
];

/// Adapters: configuration and tensors.
pub const ADAPTERS: [(&[u8], &[u8]); 4] = [
    (reference!("peft/rank1/adapter_config.json"), reference!("peft/rank1/adapter_model.safetensors")),
    (reference!("peft/rank8_dora/adapter_config.json"), reference!("peft/rank8_dora/adapter_model.safetensors")),
    (reference!("peft/rank8_nodq/adapter_config.json"), reference!("peft/rank8_nodq/adapter_model.safetensors")),
    (reference!("peft/rank16_rslora/adapter_config.json"), reference!("peft/rank16_rslora/adapter_model.safetensors")),
];

/// Header and data of a file that is well-formed.
pub fn parts(file: &[u8]) -> (&[u8], &[u8]) {
    let len = u64::from_le_bytes(file[..8].try_into().expect("8 bytes"));
    file[8..].split_at(usize::try_from(len).expect("a small file"))
}

/// A file with this header, and with as many of these bytes of data, over and over, as the header asks for: so the
/// fuzzer changes a header without having to find the length that it then needs.
pub fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    /// The data that a header may ask for.
    const MOST: u64 = 1 << 16;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    // The number of bytes that are missing stands in the error; with too few bytes in the file it is of another kind.
    for _ in 0..2 {
        if let Err(nf4::checkpoint::CheckpointError::Bytes { expected, got, .. }) = TensorFile::parse(&file)
            && got < expected
            && expected <= MOST
        {
            file.extend(data.iter().cycle().take(usize::try_from(expected - got).unwrap_or(0)));
        }
    }
    file
}

/// The file with other bytes: `changes` are a place (u16, little endian) and what to combine its byte with, over and over.
pub fn changed(file: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    for &[low, high, change] in changes.as_chunks().0 {
        let at = usize::from(u16::from_le_bytes([low, high])) % file.len();
        file[at] ^= change;
    }
    file
}

/// The tensors of a well-formed file.
pub fn tensors(file: &[u8]) -> TensorMap<'_> {
    let data = &file[file.len() - parts(file).1.len()..];
    let file = TensorFile::parse(file).expect("a file of the reference");
    let tensors = file.header().iter().map(|(name, info)| {
        let bytes = &data[info.data_offsets.0..info.data_offsets.1];
        (name.to_owned(), TensorData::new(name, info.dtype, info.shape.clone(), bytes).expect("a tensor of the file"))
    });
    tensors.collect()
}

/// A vector of bytes, as a file holds text.
pub fn text<'a>(name: &str, bytes: &'a [u8]) -> TensorData<'a> {
    TensorData::new(name, Dtype::U8, vec![bytes.len()], bytes).expect("one byte each")
}

/// Name, type, shape and bytes of all tensors, for comparison.
pub fn contents(source: &dyn TensorSource) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let tensor = |name: &str| {
        let info = source.info(name).expect("it was named");
        (name.to_owned(), info.dtype, info.shape.clone(), source.read(name).expect("it is in memory").into_owned())
    };
    let mut all: Vec<_> = source.names().map(tensor).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Panics if `run` holds more memory at a time than an input of this length can have a use for, and `fixed` besides.
///
/// The most that a byte of a file may cost: JSON takes 32 bytes for a value of two characters, in a vector that is
/// copied to one twice as large when it is full; 4-bit codes are dequantized to 8 times their size, and written.
pub fn measured(input: usize, fixed: u64, run: impl FnOnce()) {
    let used = allocation_counter::measure(run);
    let limit = 128 * input as u64 + (1 << 16) + fixed;
    assert!(used.bytes_max <= limit, "{} bytes for an input of {input}", used.bytes_max);
}
