//! The files that a command reads: each is opened only if it is a regular one, and remembered, so that no output replaces
//! it and none is more public than it.

use std::fs::{self, File, Metadata};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A file or directory, whatever path leads to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity(#[cfg(unix)] [u64; 2], #[cfg(not(unix))] PathBuf);

impl Identity {
    /// Of what a path leads to.
    pub(crate) fn of(path: &Path) -> std::io::Result<Self> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let at = fs::metadata(path)?;
            Ok(Self([at.dev(), at.ino()]))
        }
        #[cfg(not(unix))]
        fs::canonicalize(path).map(Self)
    }
}

/// Permissions of new files and directories, on systems that have such; the user's mask restricts them further.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permissions {
    file: u32,
    directory: u32,
}

impl Permissions {
    /// What everybody may do.
    const ALL: Self = Self { file: 0o666, directory: 0o777 };

    /// What only the owner may do, who has to write the output.
    pub(crate) const PRIVATE: Self = Self { file: 0o600, directory: 0o700 };

    /// Only what an input permits as well.
    fn restrict(&mut self, input: &Metadata) {
        #[cfg(unix)]
        let mode = std::os::unix::fs::MetadataExt::mode(input);
        #[cfg(not(unix))]
        let mode = Self::ALL.directory;
        if input.is_dir() {
            self.directory &= mode | Self::PRIVATE.directory;
        } else {
            self.file &= mode | Self::PRIVATE.file;
        }
    }

    /// Creates a file, which must not exist.
    pub(crate) fn create_file(self, path: &Path) -> std::io::Result<File> {
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, self.file);
        options.open(path)
    }

    /// Creates a directory, which must not exist.
    pub(crate) fn create_directory(self, path: &Path) -> std::io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, self.directory);
        builder.recursive(false).create(path)
    }
}

/// What a command reads.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    /// Each with all directories that hold it.
    list: Vec<(PathBuf, Vec<Identity>)>,
    permissions: Permissions,
}

impl Default for Inputs {
    fn default() -> Self {
        Self { list: Vec::new(), permissions: Permissions::ALL }
    }
}

impl Inputs {
    /// Opens a file to be read. What is not a regular file is an error, and is not opened: a pipe would wait for a writer.
    pub(crate) fn open(&mut self, path: &Path) -> Result<File> {
        let open = || -> Result<(File, Metadata)> {
            ensure!(fs::metadata(path)?.is_file(), "not a regular file");
            let mut options = File::options();
            options.read(true);
            // It may have been replaced by a pipe since.
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, NONBLOCK);
            let file = options.open(path)?;
            let metadata = file.metadata()?;
            ensure!(metadata.is_file(), "not a regular file");
            Ok((file, metadata))
        };
        let (file, metadata) = open().with_context(|| path.display().to_string())?;
        self.add(path, &metadata)?;
        Ok(file)
    }

    /// Remembers a file or directory that is read elsewhere.
    pub(crate) fn note(&mut self, path: &Path) -> Result<()> {
        let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
        self.add(path, &metadata)
    }

    fn add(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        let canonical = path.canonicalize().with_context(|| path.display().to_string())?;
        let holders = canonical.ancestors().filter_map(|a| Identity::of(a).ok()).collect();
        self.list.push((path.to_owned(), holders));
        self.permissions.restrict(metadata);
        Ok(())
    }

    /// Remembers all of the others too.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.list.extend_from_slice(&other.list);
        self.permissions.file &= other.permissions.file;
        self.permissions.directory &= other.permissions.directory;
    }

    /// An input that is the given file or directory, or lies in it.
    pub(crate) fn within(&self, place: &Identity) -> Option<&Path> {
        self.list.iter().find(|(_, holders)| holders.contains(place)).map(|(path, _)| &**path)
    }

    /// What may be done with an output by those who may do it with every input.
    pub(crate) fn permissions(&self) -> Permissions {
        self.permissions
    }
}

/// Opens a pipe without waiting for its writer.
#[cfg(unix)]
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
