//! Directories as the hub's cache keeps them, and weights as only Python reads them.

use std::borrow::Cow;
use std::fs;
use std::io::Read;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};

use crate::inputs::Inputs;

/// What to do with a pickle.
pub(crate) const PICKLE: &str = "a pickle, which is a program and is never run here; load it in Python, with \
     torch.load(..., weights_only=True), and save it as safetensors: save_pretrained does, or safetensors.torch.save_file";

/// Bytes that are read of a branch: it is the name of a directory.
const MAX_REVISION: u64 = 256;

/// The directory that a path means: of a cache entry (`models--owner--name`) the snapshot of its branch `main`, or the only
/// one that it has; else the path itself.
pub(crate) fn resolve(path: &Path) -> Result<Cow<'_, Path>> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() || path.join("config.json").exists() {
        return Ok(Cow::Borrowed(path));
    }
    let at = || path.display().to_string();
    let main = path.join("refs").join("main");
    if main.is_file() {
        let mut text = String::new();
        let file = Inputs::default().open(&main)?;
        file.take(MAX_REVISION).read_to_string(&mut text).with_context(|| main.display().to_string())?;
        let mut parts = Path::new(text.trim()).components();
        if let (Some(Component::Normal(revision)), None) = (parts.next(), parts.next())
            && snapshots.join(revision).is_dir()
        {
            return Ok(Cow::Owned(snapshots.join(revision)));
        }
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&snapshots).with_context(at)? {
        let entry = entry.with_context(at)?.path();
        if entry.is_dir() {
            found.push(entry);
        }
    }
    found.sort_unstable();
    match &*found {
        [only] => Ok(Cow::Owned(only.clone())),
        [] => bail!("{}: a cache entry without a snapshot", at()),
        more => {
            let names: Vec<String> = more.iter().map(|path| path.display().to_string()).collect();
            bail!("{}: a cache entry with several snapshots, and refs/main names none: {}", at(), names.join(", "))
        }
    }
}
