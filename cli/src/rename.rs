//! Renaming that never replaces anything unseen, and what makes a rename last: syncing.
//!
//! Linux and Apple's systems have calls for it. Some file systems do not know them, nor do other systems; there it is done
//! in steps that lose nothing either.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

/// Renames a file or directory. [`ErrorKind::AlreadyExists`] if there is anything at `to`.
pub(crate) fn without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    match system::without_replacing(from, to) {
        Err(error) if is_unsupported(&error) => without_replacing_in_steps(from, to),
        result => result,
    }
}

/// Exchanges two files or directories, so that there is never a moment without one at either path.
/// [`ErrorKind::Unsupported`] where this cannot be done.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    system::exchange(a, b).map_err(|e| if is_unsupported(&e) { ErrorKind::Unsupported.into() } else { e })
}

/// A file system that does not know a call says so in one of these ways.
fn is_unsupported(error: &io::Error) -> bool {
    [ErrorKind::Unsupported, ErrorKind::InvalidInput].contains(&error.kind())
}

/// As [`without_replacing`], with what every system has.
///
/// A directory replaces none but an empty one. A file gets a second name, which must be new, and loses its first. A file
/// system without second names, such as exFAT, has an empty file at `to` for a moment.
fn without_replacing_in_steps(from: &Path, to: &Path) -> io::Result<()> {
    if to.symlink_metadata().is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    if from.symlink_metadata()?.is_dir() {
        return fs::rename(from, to).map_err(|error| match error.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory => ErrorKind::AlreadyExists.into(),
            _ => error,
        });
    }
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(error),
        Err(_) => claim(from, to),
    }
}

/// Renames a file to a name that is taken, if it is free, by an empty file.
fn claim(from: &Path, to: &Path) -> io::Result<()> {
    File::create_new(to)?;
    fs::rename(from, to).inspect_err(|_| {
        // There is nothing left to do about an empty file that cannot be removed.
        let _ = fs::remove_file(to);
    })
}

/// Waits until a file, or the names in a directory, are on the disk.
pub(crate) fn sync(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return sync_directory(path);
    }
    // Windows syncs only what may be written.
    File::options().read(true).write(cfg!(windows)).open(path)?.sync_all()
}

/// Windows cannot open a directory, and keeps names in a journal; some file systems do not sync directories.
fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match File::open(path)?.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        result => result,
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
mod system {
    use std::io;
    use std::path::Path;

    use rustix::fs::{CWD, RenameFlags, renameat_with};

    pub(super) fn without_replacing(from: &Path, to: &Path) -> io::Result<()> {
        Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
    }

    pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
mod system {
    use std::io::{self, ErrorKind};
    use std::path::Path;

    pub(super) fn without_replacing(_: &Path, _: &Path) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    pub(super) fn exchange(_: &Path, _: &Path) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tempfile::{TempDir, tempdir};

    use super::*;

    /// A folder with a new file and directory, and every kind of thing that may stand in the way.
    fn folder() -> (TempDir, impl Fn(&str) -> PathBuf) {
        let root = tempdir().unwrap();
        let base = root.path().to_owned();
        for file in ["file", "other"] {
            fs::write(base.join(file), file).unwrap();
        }
        for directory in ["directory", "full", "empty"] {
            fs::create_dir(base.join(directory)).unwrap();
        }
        for file in ["directory/new", "full/old"] {
            fs::write(base.join(file), file).unwrap();
        }
        #[cfg(unix)]
        std::os::unix::fs::symlink("nowhere", base.join("link")).unwrap();
        (root, move |name| base.join(name))
    }

    const IN_THE_WAY: &[&str] =
        if cfg!(unix) { &["other", "full", "empty", "link"] } else { &["other", "full", "empty"] };

    #[test]
    fn nothing_is_replaced() {
        type Rename = fn(&Path, &Path) -> io::Result<()>;
        let all: [(&str, &[&str], Rename); 3] = [
            ("the system's call", &["file", "directory"], without_replacing),
            ("steps", &["file", "directory"], without_replacing_in_steps),
            ("a claim", &["file"], claim),
        ];
        for (how, kinds, rename) in all {
            for from in kinds {
                let (root, path) = folder();
                let before = fs::read_dir(root.path()).unwrap().count();
                for to in IN_THE_WAY {
                    let error = rename(&path(from), &path(to)).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{how}: {from} to {to}: {error}");
                }
                assert_eq!(fs::read_dir(root.path()).unwrap().count(), before);
                assert_eq!(fs::read(path("other")).unwrap(), b"other");
                assert_eq!(fs::read(path("full/old")).unwrap(), b"full/old");
                rename(&path(from), &path("free")).unwrap();
                assert!(path("free").exists() && !path(from).exists(), "{how}");
            }
        }
    }

    /// Of a directory and a file that has come since the look, the rename itself refuses all but an empty directory.
    #[cfg(unix)]
    #[test]
    fn a_directory_that_was_not_seen() {
        for to in ["other", "full", "link"] {
            let (_root, path) = folder();
            fs::rename(path("directory"), path(to)).unwrap_err();
        }
    }

    #[test]
    fn exchanged_or_not_at_all() {
        let (_root, path) = folder();
        match exchange(&path("directory"), &path("other")) {
            Ok(()) => {
                assert_eq!(fs::read(path("directory")).unwrap(), b"other");
                assert_eq!(fs::read(path("other/new")).unwrap(), b"directory/new");
                println!("exchanged by the system");
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert_eq!(fs::read(path("other")).unwrap(), b"other");
                println!("this system does not exchange");
            }
        }
        assert_ne!(exchange(&path("file"), &path("nothing")).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(path("file")).unwrap(), b"file");
    }

    #[test]
    fn synced() {
        let (_root, path) = folder();
        for name in ["file", "directory"] {
            sync(&path(name)).unwrap();
        }
        assert_eq!(sync(&path("nothing")).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
