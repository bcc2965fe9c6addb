//! Reads and writes at a position, so that threads share a file without a cursor; and little-endian floats.

use std::fs::File;
use std::io;

use nf4::{Float, bf16, f16};

/// Fills `buffer` with the bytes from `offset` on.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Writes all `bytes` from `offset` on.
#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Fills `buffer` with the bytes from `offset` on.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, buffer, offset)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[n..];
        offset += n as u64;
    }
    Ok(())
}

/// Writes all `bytes` from `offset` on.
#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[n..];
        offset += n as u64;
    }
    Ok(())
}

/// An element type of weights, as it stands in a file.
pub(crate) trait FileFloat: Float {
    /// The values of whole little-endian elements, in `out`, which is cleared first.
    fn read(bytes: &[u8], out: &mut Vec<Self>);

    /// The little-endian bytes of `values`, in `out`, which is cleared first.
    fn write(values: &[Self], out: &mut Vec<u8>);
}

macro_rules! file_float {
    ($type:ty, $bytes:literal) => {
        impl FileFloat for $type {
            fn read(bytes: &[u8], out: &mut Vec<Self>) {
                out.clear();
                out.extend(bytes.as_chunks::<$bytes>().0.iter().map(|b| Self::from_le_bytes(*b)));
            }

            fn write(values: &[Self], out: &mut Vec<u8>) {
                out.resize(values.len() * $bytes, 0);
                let chunks = out.as_chunks_mut::<$bytes>().0;
                chunks.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes());
            }
        }
    };
}

file_float!(f32, 4);
file_float!(f16, 2);
file_float!(bf16, 2);
