//! Interrupts: Ctrl-C, SIGTERM and SIGHUP end the program with status 130, and what is unfinished is removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

/// Directories that hold what is unfinished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Whether the output is in its place, which no interrupt takes back.
static FINISHED: AtomicBool = AtomicBool::new(false);

/// From now on, which is while [`hold`] is held, an interrupt comes too late: the program ends by itself, and with success.
pub(crate) fn finished() {
    FINISHED.store(true, Ordering::Relaxed);
}

/// No interrupt ends the program while this is held. It lists what an interrupt removes.
pub(crate) fn hold() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles interrupts from now on.
pub(crate) fn handle() -> Result<()> {
    let end = || {
        let unfinished = hold();
        if !FINISHED.load(Ordering::Relaxed) {
            unfinished.iter().for_each(|path| remove(path));
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(end).context("no handler for interrupts")
}

/// Removes a directory and all that is in it. There is nobody left to tell of a failure.
pub(crate) fn remove(directory: &Path) {
    // Threads that are still at work may add a file meanwhile.
    for _ in 0..10 {
        if fs::remove_dir_all(directory).is_ok() || directory.symlink_metadata().is_err() {
            break;
        }
    }
}
