//! The hidden directory in which an output is made.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow, bail};

use crate::inputs::Permissions;
use crate::interrupt;

/// A hidden directory that only the owner may enter. It is removed when it is dropped, or when an interrupt ends the
/// program.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(crate) path: PathBuf,
    kept: bool,
}

impl Staging {
    pub(crate) fn create(parent: &Path) -> Result<Self> {
        let mut unfinished = interrupt::hold();
        // Other processes have such directories as well, also on other machines that share the file system.
        for number in 0..1000 {
            let path = parent.join(format!(".nf4-partial-{}-{number}", std::process::id()));
            match Permissions::PRIVATE.create_directory(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                result => {
                    result.with_context(|| path.display().to_string())?;
                    unfinished.push(path.clone());
                    return Ok(Self { path, kept: false });
                }
            }
        }
        bail!("{}: no free name for a hidden directory", parent.display())
    }

    /// Where the output is until it gets its name; what it is exchanged with is here afterwards.
    pub(crate) fn output(&self) -> PathBuf {
        self.path.join("output")
    }

    /// Where what stands at the place is moved to, if it cannot be exchanged.
    pub(crate) fn replaced(&self) -> PathBuf {
        self.path.join("replaced")
    }

    /// It holds what must not be removed and could not be put back.
    pub(crate) fn keep(&mut self, error: &Error) -> Error {
        self.kept = true;
        anyhow!("{error:#}; it was moved to {}, and cannot be put back", self.path.display())
    }

    /// An interrupt does not remove it either.
    pub(crate) fn unlist_if_kept(&self, unfinished: &mut Vec<PathBuf>) {
        if self.kept {
            unfinished.retain(|path| *path != self.path);
        }
    }

    /// Removes it with what was replaced.
    pub(crate) fn remove(mut self) -> std::io::Result<()> {
        self.kept = true;
        interrupt::hold().retain(|path| *path != self.path);
        fs::remove_dir_all(&self.path)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        interrupt::hold().retain(|path| *path != self.path);
        if !self.kept {
            interrupt::remove(&self.path);
        }
    }
}
