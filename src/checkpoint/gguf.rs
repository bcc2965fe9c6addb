//! GGUF files of dense tensors, version 3.
//!
//! All numbers are little endian. The file is `GGUF`, version (u32), number of tensors and of metadata entries (u64
//! each), the metadata, a description of each tensor, and the data, which begins at a multiple of 32 bytes, as each
//! tensor does. A string is its length (u64) and UTF-8. A metadata entry is key, type (u32) and value; a description is
//! name, number of dimensions (u32), these (u64 each, **the fastest first**, the other way round than in safetensors),
//! type (u32) and offset into the data (u64). Source: `docs/gguf.md` of the `ggml` project; the numbers of types are
//! those of `enum ggml_type` and `enum gguf_type` there, those of file types of `enum llama_ftype` in `llama.h`.
//!
//! Unlike the crates for GGUF, this is small and does not need `std`. The names of tensors are not changed; programs that
//! expect names of their own (`blk.0.attn_q.weight`) need them translated.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use safetensors::Dtype;

use super::error::CheckpointError;
use super::header::tensor_bytes;
use super::read::{bytes_of, info_of};
use super::source::TensorSource;

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
/// `GGML_MAX_NAME`, which counts the zero at the end.
const NAME_LIMIT: usize = 64;
/// `GGML_MAX_DIMS`.
const DIMENSIONS_LIMIT: usize = 4;

/// A value in the metadata of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GgufValue {
    /// A 32-bit unsigned integer.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// A string.
    String(String),
}

/// Writes a GGUF file of F32, F16 and BF16 tensors, one tensor at a time, by passing the bytes to `sink` in order.
///
/// `architecture` is `general.architecture`, which every file must have; `general.file_type` is set from the types of
/// the matrices. `metadata` comes after them.
///
/// # Errors
/// [`CheckpointError::Type`] for a tensor of another type; [`CheckpointError::Unsupported`] for a name of more than 63
/// bytes or more than 4 dimensions; those of the source and of `sink`.
pub fn write_gguf(
    source: &dyn TensorSource,
    architecture: &str,
    metadata: &[(&str, GgufValue)],
    sink: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let mut names: Vec<&str> = source.names().collect();
    names.sort_unstable();
    names.dedup();
    let mut head = b"GGUF".to_vec();
    put_u32(&mut head, VERSION);
    put_u64(&mut head, names.len());
    put_u64(&mut head, 2 + metadata.len());
    put_entry(&mut head, "general.architecture", &GgufValue::String(architecture.to_owned()));
    put_entry(&mut head, "general.file_type", &GgufValue::U32(file_type(source, &names)?));
    metadata.iter().for_each(|(key, value)| put_entry(&mut head, key, value));
    let mut offset = 0_usize;
    for name in &names {
        let bytes = put_description(&mut head, source, name, offset)?;
        let overflow = || CheckpointError::Overflow { tensor: (*name).to_owned(), shape: alloc::vec![bytes] };
        offset = bytes.checked_next_multiple_of(ALIGNMENT).and_then(|b| offset.checked_add(b)).ok_or_else(overflow)?;
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    sink(&head)?;
    for name in names {
        let bytes = bytes_of(source, name)?;
        sink(&bytes)?;
        sink(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
    }
    Ok(())
}

/// The number of a type in `enum ggml_type`.
fn ggml_type(name: &str, dtype: Dtype) -> Result<u32, CheckpointError> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::F16 => Ok(1),
        Dtype::BF16 => Ok(30),
        got => Err(CheckpointError::Type { tensor: name.to_owned(), expected: "F32, F16 or BF16 for GGUF", got }),
    }
}

/// `LLAMA_FTYPE_ALL_F32`, `LLAMA_FTYPE_MOSTLY_F16` or `LLAMA_FTYPE_MOSTLY_BF16`.
fn file_type(source: &dyn TensorSource, names: &[&str]) -> Result<u32, CheckpointError> {
    let mut elements = [0_usize; 3];
    for name in names {
        let info = info_of(source, name)?;
        let slot = match ggml_type(name, info.dtype)? {
            0 => 0,
            1 => 1,
            _ => 2,
        };
        let bytes = tensor_bytes(name, info.dtype, &info.shape)?;
        elements[slot] = elements[slot].saturating_add(bytes * 8 / info.dtype.bitsize());
    }
    let [f32, f16, bf16] = elements;
    Ok(if f32 >= f16.max(bf16) {
        0
    } else if f16 >= bf16 {
        1
    } else {
        32
    })
}

/// Describes a tensor, and returns its length.
fn put_description(
    out: &mut Vec<u8>,
    source: &dyn TensorSource,
    name: &str,
    offset: usize,
) -> Result<usize, CheckpointError> {
    let unsupported = |variant| CheckpointError::Unsupported { what: name.to_owned(), variant };
    let info = info_of(source, name)?;
    if name.len() >= NAME_LIMIT {
        return Err(unsupported(format!("in GGUF, a name of {} bytes", name.len())));
    }
    if info.shape.len() > DIMENSIONS_LIMIT {
        return Err(unsupported(format!("in GGUF, a shape {:?} of more than 4 dimensions", info.shape)));
    }
    put_string(out, name);
    // A scalar is a vector of one.
    let shape = if info.shape.is_empty() { &[1][..] } else { &info.shape };
    let dimensions = shape.iter().fold(0, |count, _| count + 1);
    put_u32(out, dimensions);
    shape.iter().rev().for_each(|dim| put_u64(out, *dim));
    put_u32(out, ggml_type(name, info.dtype)?);
    put_u64(out, offset);
    tensor_bytes(name, info.dtype, &info.shape)
}

fn put_entry(out: &mut Vec<u8>, key: &str, value: &GgufValue) {
    put_string(out, key);
    match value {
        GgufValue::U32(x) => {
            put_u32(out, 4);
            put_u32(out, *x);
        }
        GgufValue::F32(x) => {
            put_u32(out, 6);
            put_u32(out, x.to_bits());
        }
        GgufValue::Bool(x) => {
            put_u32(out, 7);
            out.push(u8::from(*x));
        }
        GgufValue::String(x) => {
            put_u32(out, 8);
            put_string(out, x);
        }
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_u32(out: &mut Vec<u8>, x: u32) {
    out.extend_from_slice(&x.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, x: usize) {
    out.extend_from_slice(&(x as u64).to_le_bytes());
}
