//! An output is made in a hidden directory beside its place, synced, and renamed when it is complete: whenever the program
//! fails or is killed, what stands under the output's name is whole.
//!
//! Whether something may be replaced is decided when the output gets its name, from what stands there then.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::inputs::Inputs;
use crate::place::Place;
use crate::rename::sync;
use crate::staging::Staging;

/// A file or directory being made. What there is of it is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Output {
    place: Place,
    staging: Staging,
}

/// A complete output that does not have its name yet. Without [`Self::commit`] it is removed.
#[derive(Debug)]
pub(crate) struct Sealed(Output);

impl Output {
    /// An output at `target`, made from `inputs`.
    ///
    /// What stands there now, or when the output is complete, is replaced only with `force`, and only if it is
    ///
    /// * of the same kind: a regular file, or a directory as this program makes them, empty or with regular files alone,
    ///   one of which is a `.safetensors` file;
    /// * not an input, and does not hold one.
    pub(crate) fn new(target: &Path, is_dir: bool, force: bool, inputs: Inputs) -> Result<Self> {
        let at = target.display();
        let name = target.file_name().with_context(|| format!("{at}: not a name for an output"))?;
        let ends_as_directory = target.to_string_lossy().ends_with(std::path::is_separator);
        ensure!(is_dir || !ends_as_directory, "{at}: the name of a directory, but the output is a file");
        let parent = parent(target);
        ensure!(parent.is_dir(), "{at}: there is no directory {}", parent.display());
        let parent = parent.canonicalize().with_context(|| at.to_string())?;
        let place = Place { path: parent.join(name), shown: target.to_owned(), is_dir, force, inputs };
        place.check_free_or_replaceable()?;
        let staging = Staging::create(&parent)?;
        if is_dir {
            place.inputs.permissions().create_directory(&staging.output()).with_context(|| at.to_string())?;
        }
        Ok(Self { place, staging })
    }

    /// Creates a file of the output, which is in it if it is a directory, and else all of it. No input is more private.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> Result<File> {
        let path = if self.place.is_dir { self.staging.output().join(&name) } else { self.staging.output() };
        let created = self.place.inputs.permissions().create_file(&path);
        created.with_context(|| self.path(name).display().to_string())
    }

    /// Where a file of the output will be, for messages.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        if self.place.is_dir { self.place.shown.join(name) } else { self.place.shown.clone() }
    }

    /// Waits until all of it is on the disk.
    pub(crate) fn seal(self) -> Result<Sealed> {
        let new = self.staging.output();
        let sync_all = || -> std::io::Result<()> {
            if self.place.is_dir {
                fs::read_dir(&new)?.try_for_each(|entry| sync(&entry?.path()))?;
            }
            sync(&new)
        };
        sync_all().with_context(|| format!("{}: cannot sync", self.place.shown.display()))?;
        Ok(Sealed(self))
    }
}

impl Sealed {
    /// Gives the output its name. Returns what should be said about something that was replaced and could not be removed.
    pub(crate) fn commit(self) -> Result<Option<String>> {
        let Self(Output { place, mut staging }) = self;
        place.put(&mut staging)?;
        let parent = parent(&place.path);
        sync(parent).with_context(|| {
            format!("{} is complete, but may not survive a power failure: {}", place.shown.display(), parent.display())
        })?;
        let path = staging.path.clone();
        let removed = staging.remove();
        Ok(removed.err().map(|error| format!("{}: what was replaced cannot be removed: {error}", path.display())))
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
