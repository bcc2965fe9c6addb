//! The place of an output: what may be replaced there, and how that happens so that nothing is lost.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};

use crate::inputs::{Identity, Inputs};
use crate::interrupt;
use crate::rename::{exchange, without_replacing};
use crate::staging::Staging;

/// Where an output goes, and what is known of that place.
#[derive(Debug)]
pub(crate) struct Place {
    /// An absolute path without links, up to the name.
    pub(crate) path: PathBuf,
    /// The path that was given.
    pub(crate) shown: PathBuf,
    pub(crate) is_dir: bool,
    pub(crate) force: bool,
    pub(crate) inputs: Inputs,
}

impl Place {
    /// `Ok` if the output could get its name now.
    pub(crate) fn check_free_or_replaceable(&self) -> Result<()> {
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
    pub(crate) fn put(&self, staging: &mut Staging) -> Result<()> {
        let mut unfinished = interrupt::hold();
        let put = self.put_uninterrupted(staging);
        if put.is_ok() {
            interrupt::finished();
        }
        staging.unlist_if_kept(&mut unfinished);
        put
    }

    fn put_uninterrupted(&self, staging: &mut Staging) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use tempfile::{TempDir, tempdir};

    use super::*;

    type Replace = fn(&Place, &mut Staging) -> Result<()>;

    /// Both ways, one after the other: the second is for systems and file systems that do not have the first.
    const WAYS: [(&str, Replace); 2] = [("exchange", Place::replace), ("steps", Place::replace_in_steps)];

    fn set_up(is_dir: bool) -> (TempDir, Place, Staging) {
        let root = tempdir().unwrap();
        let parent = root.path().canonicalize().unwrap();
        let staging = Staging::create(&parent).unwrap();
        if is_dir {
            fs::create_dir(staging.output()).unwrap();
            fs::write(staging.output().join("model.safetensors"), "new").unwrap();
        } else {
            fs::write(staging.output(), "new").unwrap();
        }
        let path = parent.join("out");
        (root, Place { shown: path.clone(), path, is_dir, force: true, inputs: Inputs::default() }, staging)
    }

    #[test]
    fn replaced() {
        for (way, replace) in WAYS {
            let (_root, place, mut staging) = set_up(false);
            fs::write(&place.path, "old").unwrap();
            replace(&place, &mut staging).unwrap();
            assert_eq!(fs::read(&place.path).unwrap(), b"new", "{way}");
            staging.remove().unwrap();

            let (root, place, mut staging) = set_up(true);
            fs::create_dir(&place.path).unwrap();
            fs::write(place.path.join("old.safetensors"), "old").unwrap();
            replace(&place, &mut staging).unwrap();
            staging.remove().unwrap();
            assert_eq!(fs::read(place.path.join("model.safetensors")).unwrap(), b"new", "{way}");
            assert!(!place.path.join("old.safetensors").exists(), "{way}");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{way}");
        }
    }

    /// What came to the place after it was checked, and may not be replaced, is there afterwards.
    #[test]
    fn put_back() {
        for (way, replace) in WAYS {
            for kind in ["thesis", "input", "link", "directory"] {
                let (root, mut place, mut staging) = set_up(kind != "directory");
                let path = place.path.clone();
                match kind {
                    "link" => {
                        #[cfg(unix)]
                        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
                        #[cfg(not(unix))]
                        fs::write(&path, "file").unwrap();
                    }
                    _ => fs::create_dir(&path).unwrap(),
                }
                if kind == "input" {
                    fs::write(path.join("model.safetensors"), "input").unwrap();
                    place.inputs.note(&path.join("model.safetensors")).unwrap();
                }
                if kind == "thesis" {
                    fs::write(path.join("thesis.txt"), "thesis").unwrap();
                }
                let before = path.symlink_metadata().unwrap();
                replace(&place, &mut staging).unwrap_err();
                drop(staging);
                let after = path.symlink_metadata().unwrap();
                assert_eq!(before.file_type(), after.file_type(), "{way}: {kind}");
                assert_eq!(before.modified().unwrap(), after.modified().unwrap(), "{way}: {kind}");
                assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{way}: {kind}");
                let file = match kind {
                    "thesis" => "thesis.txt",
                    "input" => "model.safetensors",
                    _ => continue,
                };
                assert_eq!(fs::read(path.join(file)).unwrap(), kind.as_bytes(), "{way}");
            }
        }
    }

    #[test]
    fn nothing_there() {
        for (way, replace) in WAYS {
            let (_root, place, mut staging) = set_up(true);
            assert!(is_not_found(&replace(&place, &mut staging).unwrap_err()), "{way}");
            place.put(&mut staging).unwrap();
            assert_eq!(fs::read(place.path.join("model.safetensors")).unwrap(), b"new", "{way}");
        }
    }
}
