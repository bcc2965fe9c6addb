//! Writes a tensor that is computed row by row.

use core::ops::Range;

use anyhow::Result;

use crate::build::{Buffers, Job};
use crate::io::FileFloat;

/// Weights that a thread computes at a time; at least a row.
const CHUNK: usize = 1 << 17;

/// Writes a tensor `[rows, cols]` whose rows `fill` computes, in chunks of rows that the threads share.
pub(crate) fn write_rows<T: FileFloat>(
    name: &str,
    [rows, cols]: [usize; 2],
    job: &mut Job<'_, Buffers>,
    fill: impl Fn(Range<usize>, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    let Job { writer, progress, .. } = *job;
    if cols == 0 {
        return Ok(());
    }
    job.workers.run(rows, (CHUNK / cols).max(1), |buffers, part| {
        let offset = (part.start * cols * size_of::<T>()) as u64;
        let mut weights = vec![T::from_f32(0.0); part.len() * cols];
        fill(part, &mut weights)?;
        T::write(&weights, &mut buffers.bytes);
        writer.write(name, offset, &buffers.bytes)?;
        progress.add(buffers.bytes.len() as u64);
        Ok(())
    })
}
