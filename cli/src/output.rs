//! An output is made in a hidden directory beside its place, synced, and renamed when it is complete: whenever the program
//! fails or is killed, what stands under the output's name is whole.
//!
//! Whether something may be replaced is decided when the output gets its name, from what stands there then.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};

use crate::inputs::{Identity, Inputs, Permissions};
use crate::interrupt;
use crate::rename::{exchange, sync, without_replacing};

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
        let ends_as_directory = target.as_os_str().as_encoded_bytes().ends_with(b"/");
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
        let no_interrupt = interrupt::hold();
        let committed = place.put(&mut staging);
        drop(no_interrupt);
        committed?;
        let parent = parent(&place.path);
        sync(parent).with_context(|| format!("{}: cannot sync", parent.display()))?;
        let path = staging.path.clone();
        let removed = staging.remove();
        Ok(removed.err().map(|error| format!("{}: what was replaced cannot be removed: {error}", path.display())))
    }
}

/// Where an output goes, and what is known of that place.
#[derive(Debug)]
struct Place {
    /// An absolute path without links, up to the name.
    path: PathBuf,
    /// The path that was given.
    shown: PathBuf,
    is_dir: bool,
    force: bool,
    inputs: Inputs,
}

impl Place {
    /// `Ok` if the output could get its name now.
    fn check_free_or_replaceable(&self) -> Result<()> {
        match self.path.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| self.shown.display().to_string()),
            Ok(_) if !self.force => Err(self.exists()),
            Ok(_) => self.check_replaceable(&self.path),
        }
    }

    fn exists(&self) -> Error {
        anyhow!("{} exists; it is replaced only with --force", self.shown.display())
    }

    /// `Ok` if what stands at `path`, which is the place or where things of the place were moved to, may be replaced.
    fn check_replaceable(&self, path: &Path) -> Result<()> {
        let at = self.shown.display();
        let kind = path.symlink_metadata().with_context(|| at.to_string())?.file_type();
        ensure!(kind.is_file() || kind.is_dir(), "{at} exists and is neither a regular file nor a directory");
        ensure!(
            kind.is_dir() == self.is_dir,
            "{at} exists and is {}",
            if kind.is_dir() { "a directory" } else { "a file" }
        );
        if kind.is_dir() {
            self.check_is_model(path)?;
        }
        let identity = Identity::of(path).with_context(|| at.to_string())?;
        match self.inputs.within(&identity) {
            Some(input) => bail!("{at} is, or holds, the input {}", input.display()),
            None => Ok(()),
        }
    }

    /// `Ok` if a directory is as this program makes them: regular files, one of them with tensors; or if it is empty.
    fn check_is_model(&self, directory: &Path) -> Result<()> {
        let at = self.shown.display();
        let (mut files, mut has_tensors) = (0, false);
        for entry in fs::read_dir(directory).with_context(|| at.to_string())? {
            let entry = entry.with_context(|| at.to_string())?;
            let name = entry.file_name();
            let is_file = entry.file_type().with_context(|| at.to_string())?.is_file();
            ensure!(
                is_file,
                "{at} exists and holds {}, which is not a regular file; --force does not replace it",
                name.display()
            );
            files += 1;
            has_tensors |= Path::new(&name).extension().is_some_and(|e| e == "safetensors");
        }
        ensure!(files == 0 || has_tensors, "{at} exists and holds no model; --force does not replace it");
        Ok(())
    }

    /// Moves the output to its place. What may not be replaced stays there, or is put back.
    fn put(&self, staging: &mut Staging) -> Result<()> {
        let at = || format!("cannot rename the output to {}", self.shown.display());
        // What stands in the way may go, and come back; not for ever.
        for _ in 0..100 {
            match without_replacing(&staging.output(), &self.path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                result => return result.with_context(at),
            }
            if !self.force {
                return Err(self.exists());
            }
            match self.check_replaceable(&self.path).and_then(|()| self.replace(staging)) {
                Err(error) if is_not_found(&error) => {}
                result => return result,
            }
        }
        bail!("{}: other programs create and remove it all the time", self.shown.display())
    }

    /// Moves the output to its place, and what stands there to the staging directory. It has been checked, but may be
    /// another one by now: what was really moved is checked again.
    fn replace(&self, staging: &mut Staging) -> Result<()> {
        let at = || format!("cannot rename the output to {}", self.shown.display());
        match exchange(&staging.output(), &self.path) {
            Ok(()) => {
                let old = staging.output();
                self.check_replaceable(&old).map_err(|error| {
                    let ours = Identity::of(&self.path);
                    let back = exchange(&old, &self.path);
                    // Only what is known to be ours may be removed.
                    let is_ours = || matches!((Identity::of(&old), ours), (Ok(back), Ok(ours)) if back == ours);
                    if back.is_err() || !is_ours() {
                        return staging.keep(&error);
                    }
                    error
                })
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => self.replace_in_steps(staging),
            Err(error) => Err(error).with_context(at),
        }
    }

    /// As [`Self::replace`], with what every system has: for a moment nothing stands at the place.
    fn replace_in_steps(&self, staging: &mut Staging) -> Result<()> {
        let at = || format!("cannot rename the output to {}", self.shown.display());
        let old = staging.replaced();
        fs::rename(&self.path, &old).with_context(at)?;
        let put = self
            .check_replaceable(&old)
            .and_then(|()| without_replacing(&staging.output(), &self.path).with_context(at));
        put.map_err(|error| match without_replacing(&old, &self.path) {
            Ok(()) => error,
            Err(_) => staging.keep(&error),
        })
    }
}

fn is_not_found(error: &Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::NotFound)
}

/// A hidden directory that only the owner may enter. It is removed when it is dropped, or when an interrupt ends the
/// program.
#[derive(Debug)]
struct Staging {
    path: PathBuf,
    kept: bool,
}

impl Staging {
    fn create(parent: &Path) -> Result<Self> {
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
    fn output(&self) -> PathBuf {
        self.path.join("output")
    }

    /// Where what stands at the place is moved to, if it cannot be exchanged.
    fn replaced(&self) -> PathBuf {
        self.path.join("replaced")
    }

    /// It holds what must not be removed and could not be put back.
    fn keep(&mut self, error: &Error) -> Error {
        self.kept = true;
        anyhow!("{error:#}; it was moved to {}, and cannot be put back", self.path.display())
    }

    fn remove(mut self) -> std::io::Result<()> {
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

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
