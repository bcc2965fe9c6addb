//! Work that is split by rows, one part per thread.

#[cfg(target_has_atomic = "ptr")]
use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use nf4_kernels::Kernels;

#[cfg(feature = "rayon")]
use super::threads::Rayon;
#[cfg(not(feature = "rayon"))]
use super::threads::ThisThread;
use super::threads::Threads;

/// The kernels and the threads that operations run on.
#[derive(Clone)]
pub(crate) struct Executor {
    pub(crate) kernels: Kernels,
    /// `None` for the default of [`Executor::threads`].
    #[cfg(target_has_atomic = "ptr")]
    threads: Option<Arc<dyn Threads>>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor").field("kernels", &self.kernels).field("threads", &self.threads().count()).finish()
    }
}

impl Executor {
    /// The fastest kernels of this CPU, on the default threads.
    pub(crate) fn detect() -> Self {
        Self {
            kernels: Kernels::detect(),
            #[cfg(target_has_atomic = "ptr")]
            threads: None,
        }
    }

    #[cfg(target_has_atomic = "ptr")]
    pub(crate) fn set_threads(&mut self, threads: Arc<dyn Threads>) {
        self.threads = Some(threads);
    }

    fn threads(&self) -> &dyn Threads {
        #[cfg(feature = "rayon")]
        let default = &Rayon;
        #[cfg(not(feature = "rayon"))]
        let default = &ThisThread;
        #[cfg(target_has_atomic = "ptr")]
        if let Some(threads) = &self.threads {
            return &**threads;
        }
        default
    }

    /// The number of parts into which an operation with this work is split.
    pub(super) fn parts(&self, work: usize) -> usize {
        let threads = self.threads();
        match work / threads.least_work().max(1) {
            0 | 1 => 1,
            parts => parts.min(threads.count()).max(1),
        }
    }

    /// Runs `a` and `b`, on two threads if two are free.
    pub(super) fn join<A: Send, B: Send>(&self, a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
        let (mut a, mut b) = (Task::new(a), Task::new(b));
        self.threads().join(&mut || a.run(), &mut || b.run());
        (a.result(), b.result())
    }

    /// Calls `run` for ranges that make up `rows`, each with its part of `out`, which has `per_row` elements per row. `work`
    /// is the work of all rows; see [`cost`](super::operations::cost).
    ///
    /// # Errors
    /// The first error of `run`, in the order of the rows.
    pub(crate) fn by_rows<T: Send, E: Send>(
        &self,
        work: usize,
        rows: Range<usize>,
        per_row: usize,
        out: &mut [T],
        run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        // `run` reports a wrong length.
        let fits = rows.len().checked_mul(per_row) == Some(out.len());
        self.split_rows(if fits { self.parts(work) } else { 1 }, rows, per_row, out, run)
    }

    fn split_rows<T: Send, E: Send>(
        &self,
        parts: usize,
        rows: Range<usize>,
        per_row: usize,
        out: &mut [T],
        run: &(impl Fn(Range<usize>, &mut [T]) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        if parts <= 1 || rows.len() <= 1 {
            return run(rows, out);
        }
        let count = rows.len() / parts * (parts / 2) + rows.len() % parts * (parts / 2) / parts;
        let middle = rows.start + count;
        let (top, bottom) = out.split_at_mut(count * per_row);
        let (top, bottom) = self.join(
            || self.split_rows(parts / 2, rows.start..middle, per_row, top, run),
            || self.split_rows(parts - parts / 2, middle..rows.end, per_row, bottom, run),
        );
        top.and(bottom)
    }
}

/// A function that some thread calls once, and its result.
struct Task<F, R> {
    run: Option<F>,
    result: Option<R>,
}

impl<R, F: FnOnce() -> R> Task<F, R> {
    fn new(run: F) -> Self {
        Self { run: Some(run), result: None }
    }

    /// Calls the function unless it was called before.
    fn run(&mut self) {
        if let Some(run) = self.run.take() {
            self.result = Some(run());
        }
    }

    /// The result of the function, which is called here if the pool did not call it.
    fn result(mut self) -> R {
        self.run();
        self.result.expect("the function returned, or its panic came this far")
    }
}
