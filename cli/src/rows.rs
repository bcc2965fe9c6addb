//! Writes tensors whose values are computed: row by row, or converted from another type.

use core::ops::Range;

use anyhow::{Context, Result};
use nf4::checkpoint::FloatType;

use crate::build::{Buffers, Job};
use crate::io::FileFloat;
use crate::memory;

/// Weights that a thread computes at a time; at least a row.
const CHUNK: usize = 1 << 17;

/// Writes a tensor `[rows, cols]` whose rows `fill` computes, in chunks of rows that the threads share.
pub(crate) fn write_rows<T: FileFloat>(
    name: &str,
    [rows, cols]: [usize; 2],
    job: &mut Job<'_, Buffers>,
    fill: impl Fn(Range<usize>, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let Job { shard, writer, progress, .. } = *job;
    if cols == 0 {
        return Ok(());
    }
    job.workers.run(rows, (CHUNK / cols).max(1), |buffers, part| {
        let offset = (part.start * cols * size_of::<T>()) as u64;
        let mut weights = memory::filled(part.len() * cols, T::from_f32(0.0)).with_context(|| shard.at(name))?;
        fill(part, &mut weights)?;
        T::write(&weights, &mut buffers.bytes);
        writer.write(name, offset, &buffers.bytes)?;
        progress.add(buffers.bytes.len() as u64);
        Ok(())
    })
}

/// Writes a float tensor of the shard in another type, rounded once.
pub(crate) fn convert(name: &str, from: FloatType, to: FloatType, job: &mut Job<'_, Buffers>) -> Result<()> {
    let Job { shard, writer, progress, .. } = *job;
    let range = shard.header.file_range(name).unwrap_or_default();
    let elements = usize::try_from(range.end - range.start)? / from.size();
    job.workers.run(elements, CHUNK, |buffers, part| {
        memory::resize(&mut buffers.bytes, part.len() * from.size(), 0)?;
        shard.read_part(name, (part.start * from.size()) as u64, &mut buffers.bytes)?;
        let values = from.values(&buffers.bytes);
        buffers.bytes.clear();
        to.extend_bytes(&values, &mut buffers.bytes);
        writer.write(name, (part.start * to.size()) as u64, &buffers.bytes)?;
        progress.add(buffers.bytes.len() as u64);
        Ok(())
    })
}
