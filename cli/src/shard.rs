//! One safetensors file: its header, checked by the library, and its tensors, read one at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nf4::checkpoint::Header;

use crate::inputs::Inputs;
use crate::io::read_exact_at;
use crate::memory;

pub(crate) const SINGLE: &str = "model.safetensors";

/// About the most memory that a byte of a header costs a command, which keeps what it says of each tensor and reports it.
/// An entry of a header has 50 bytes or more.
const HEADER_FACTOR: usize = 64;

/// An open safetensors file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) header: Header,
    pub(crate) file: File,
}

impl Shard {
    /// Reads the header and nothing else.
    pub(crate) fn open(path: &Path, inputs: &mut Inputs) -> Result<Self> {
        let file = inputs.open(path)?;
        let open = || -> Result<Self> {
            let length = file.metadata()?.len();
            let mut start = [0; 8];
            let short = usize::try_from(length).map_or(8, |length| length.min(8));
            read_exact_at(&file, &mut start[..short], 0)?;
            let header_len = Header::len_from(&start[..short], length)?;
            memory::probe(header_len.saturating_mul(HEADER_FACTOR))?;
            let mut header = memory::filled(header_len, 0)?;
            read_exact_at(&file, &mut header, 0)?;
            let header = Header::parse(&header, length)?;
            Ok(Self { path: path.to_owned(), header, file })
        };
        open().with_context(|| path.display().to_string())
    }

    /// The file's own name.
    pub(crate) fn name(&self) -> &str {
        self.path.file_name().and_then(|n| n.to_str()).unwrap_or(SINGLE)
    }

    /// Names of the tensors in the order of their data.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.header.iter().collect();
        names.sort_by_key(|(name, info)| (info.data_offsets, *name));
        names.into_iter().map(|(name, _)| name).collect()
    }

    /// All bytes of a tensor: as many as the header says, which the file has.
    pub(crate) fn read(&self, name: &str) -> std::io::Result<Vec<u8>> {
        let range = self.header.file_range(name).unwrap_or_default();
        let length = usize::try_from(range.end - range.start).map_err(std::io::Error::other)?;
        let mut bytes = memory::filled(length, 0)?;
        read_exact_at(&self.file, &mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Some of the bytes of a tensor, in `buffer`.
    pub(crate) fn read_part(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = self.header.file_range(name).unwrap_or_default();
        let inside = offset.checked_add(buffer.len() as u64).is_some_and(|end| end <= range.end - range.start);
        ensure!(inside, "{}: {} bytes at {offset} do not lie in it", self.at(name), buffer.len());
        read_exact_at(&self.file, buffer, range.start + offset).with_context(|| self.at(name))
    }

    /// File and tensor, for messages.
    pub(crate) fn at(&self, name: &str) -> String {
        format!("{}: {name}", self.path.display())
    }
}
