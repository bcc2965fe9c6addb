//! The threads of the model: workers of the page that run this module on the same memory.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

/// Threads that wait for a worker.
static WAITING: Mutex<Vec<ThreadBuilder>> = Mutex::new(Vec::new());

/// A pool whose first thread is the caller. Each of the others begins when a worker calls [`run`]; until then, the rest do
/// its work.
pub(crate) fn pool(count: usize) -> Result<ThreadPool> {
    let builder = ThreadPoolBuilder::new().num_threads(count).use_current_thread();
    let spawn = |thread| {
        WAITING.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    };
    builder.spawn_handler(spawn).build().context("threads")
}

/// Runs one of the threads that wait, as long as its pool exists.
pub(crate) fn run() {
    let thread = WAITING.lock().unwrap_or_else(PoisonError::into_inner).pop();
    if let Some(thread) = thread {
        thread.run();
    }
}
