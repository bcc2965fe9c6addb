//! Threads that share the elements of a tensor in chunks, each with buffers that it keeps.

use core::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Builder;

use anyhow::Result;

/// Threads, and a `B` for each.
#[derive(Debug)]
pub(crate) struct Workers<B>(Vec<B>);

impl<B: Default + Send> Workers<B> {
    /// `threads` of them, but no more than anyone can use; 0 stands for the number of processors.
    pub(crate) fn new(threads: usize) -> Self {
        const MOST: usize = 1024;
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { available() } else { threads };
        Self((0..threads.min(MOST)).map(|_| B::default()).collect())
    }

    /// Calls `work` for each chunk of `0..total`; chunks are handed out in order. After an error no new chunk is begun,
    /// and the error of the first chunk that has one is returned.
    pub(crate) fn run(
        &mut self,
        total: usize,
        chunk: usize,
        work: impl Fn(&mut B, Range<usize>) -> Result<()> + Sync,
    ) -> Result<()> {
        let (next, failed, errors) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(Vec::new()));
        let chunks = total.div_ceil(chunk);
        let share = |buffers: &mut B| {
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= chunks {
                    break;
                }
                if let Err(error) = work(buffers, i * chunk..total.min((i + 1) * chunk)) {
                    failed.store(true, Ordering::Relaxed);
                    errors.lock().expect("pushing does not panic").push((i, error));
                }
            }
        };
        let threads = self.0.len().min(chunks);
        std::thread::scope(|scope| {
            let mut workers = self.0[..threads].iter_mut();
            let own = workers.next();
            for buffers in workers {
                // The system may have no more threads; those that there are do the work.
                if Builder::new().spawn_scoped(scope, || share(buffers)).is_err() {
                    break;
                }
            }
            own.map(share);
        });
        let errors = errors.into_inner().expect("pushing does not panic");
        errors.into_iter().min_by_key(|(i, _)| *i).map_or(Ok(()), |(_, error)| Err(error))
    }
}
