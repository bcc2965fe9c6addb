//! Output under a temporary name, renamed when it is complete: a failure or a kill leaves nothing under the final name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::model::CONFIG;

/// What is to be removed if the program is interrupted. Whoever gives an output its name holds the lock meanwhile.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on an interrupt (Ctrl-C, SIGTERM, SIGHUP) ends the program with status 130 and removes what is unfinished.
pub(crate) fn clean_up_when_interrupted() -> Result<()> {
    let clean_up = || {
        let unfinished = unfinished();
        for path in &*unfinished {
            // A thread may add a file while others are being removed.
            for _ in 0..10 {
                remove(path);
                if !path.exists() {
                    break;
                }
            }
        }
        std::process::exit(130);
    };
    ctrlc::set_handler(clean_up).context("no handler for interrupts")
}

/// Removes a file or directory. There is nobody left to tell of a failure, and to have nothing there is none.
fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// A file or directory being made. Dropped without [`Self::commit`], it removes what there is.
#[derive(Debug)]
pub(crate) struct Output {
    target: PathBuf,
    temporary: PathBuf,
    done: bool,
}

impl Output {
    /// An output at `target`, made from `inputs`; a directory is created, a file is the caller's to create at
    /// [`Self::path`].
    ///
    /// If there is something at `target` it must be the same kind of thing and `force` be given. It stays until the
    /// output is complete. It must not be, or hold, an input. `force` does not replace a directory that does not hold a
    /// model.
    pub(crate) fn new(target: &Path, is_dir: bool, force: bool, inputs: &[&Path]) -> Result<Self> {
        let name = target.file_name().with_context(|| format!("{}: not a name for an output", target.display()))?;
        let parent = parent(target);
        ensure!(parent.is_dir(), "{}: there is no directory {}", target.display(), parent.display());
        if target.symlink_metadata().is_ok() {
            let at = target.display();
            ensure!(force, "{at} exists; it is replaced only with --force");
            ensure!(target.is_dir() == is_dir, "{at} exists and is {}", if is_dir { "a file" } else { "a directory" });
            ensure!(!is_dir || may_replace(target)?, "{at} exists and holds no model; --force does not replace it");
            let canonical = target.canonicalize().with_context(|| at.to_string())?;
            for input in inputs {
                let input = input.canonicalize().with_context(|| input.display().to_string())?;
                ensure!(!input.starts_with(&canonical), "{at} is, or holds, the input {}", input.display());
            }
        }
        let id = std::process::id();
        let temporary = parent.join(format!(".{}.nf4-partial-{id}", name.to_string_lossy()));
        let mut unfinished = unfinished();
        if is_dir {
            fs::create_dir(&temporary).with_context(|| temporary.display().to_string())?;
        } else {
            ensure!(!temporary.exists(), "{} exists", temporary.display());
        }
        unfinished.push(temporary.clone());
        Ok(Self { target: target.to_owned(), temporary, done: false })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the output its name. A directory that is replaced is moved aside first and removed last.
    pub(crate) fn commit(mut self) -> Result<()> {
        let _no_interrupt = unfinished();
        let at = || format!("cannot rename {} to {}", self.temporary.display(), self.target.display());
        if self.temporary.is_dir() && self.target.exists() {
            let old = self.temporary.with_extension(format!("nf4-replaced-{}", std::process::id()));
            fs::rename(&self.target, &old).with_context(at)?;
            if let Err(error) = fs::rename(&self.temporary, &self.target) {
                fs::rename(&old, &self.target).with_context(at)?;
                return Err(error).with_context(at);
            }
            self.done = true;
            return fs::remove_dir_all(&old).with_context(|| old.display().to_string());
        }
        fs::rename(&self.temporary, &self.target).with_context(at)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.done {
            remove(&self.temporary);
        }
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Whether a directory is empty or holds a model.
fn may_replace(directory: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?.peekable();
    if entries.peek().is_none() {
        return Ok(true);
    }
    let is_weights = |path: PathBuf| path.extension().is_some_and(|e| e == "safetensors");
    Ok(directory.join(CONFIG).is_file() || entries.filter_map(Result::ok).any(|e| is_weights(e.path())))
}
