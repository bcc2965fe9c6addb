//! Work on rows, shared between threads.

use alloc::sync::Arc;
use core::fmt;

/// A pool of threads, or none.
#[derive(Clone, Default)]
pub(crate) struct Pool(pub(crate) Option<Arc<dyn nf4::Threads>>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.count())
    }
}

impl Pool {
    /// Threads that work at once.
    pub(crate) fn count(&self) -> usize {
        self.0.as_ref().map_or(1, |threads| threads.count().max(1))
    }

    /// Calls `run` with the number of the first row of a part and the part of `out`, whose rows have `width` values; and
    /// with a part of `scratch`, which has `each` values for each thread. Rows do not depend on the cuts.
    pub(crate) fn by_rows<E: Send>(
        &self,
        (out, width): (&mut [f32], usize),
        (scratch, each): (&mut [f32], usize),
        run: &(impl Fn(usize, &mut [f32], &mut [f32]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        let parts = self.count().min(scratch.len().checked_div(each).unwrap_or(1)).max(1);
        self.split(parts, 0, (out, width), (scratch, each), run)
    }

    fn split<E: Send>(
        &self,
        parts: usize,
        first: usize,
        (out, width): (&mut [f32], usize),
        (scratch, each): (&mut [f32], usize),
        run: &(impl Fn(usize, &mut [f32], &mut [f32]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        let rows = out.len().checked_div(width).unwrap_or(0);
        let (true, true, Some(threads)) = (parts > 1, rows > 1, &self.0) else { return run(first, out, scratch) };
        let count = (rows * (parts / 2) / parts).max(1);
        let (top, bottom) = out.split_at_mut(count * width);
        let (mine, yours) = scratch.split_at_mut(parts / 2 * each);
        let (mut a, mut b) = (Some((top, mine)), Some((bottom, yours)));
        let (mut of_a, mut of_b) = (Ok(()), Ok(()));
        let mut run_a = || {
            if let Some((out, scratch)) = a.take() {
                of_a = self.split(parts / 2, first, (out, width), (scratch, each), run);
            }
        };
        let mut run_b = || {
            if let Some((out, scratch)) = b.take() {
                of_b = self.split(parts - parts / 2, first + count, (out, width), (scratch, each), run);
            }
        };
        threads.join(&mut run_a, &mut run_b);
        // What a pool left out.
        run_a();
        run_b();
        of_a.and(of_b)
    }
}
