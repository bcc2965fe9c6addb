//! Runs the tool.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// What the tool did.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nf4"));
    command.args(args).stdin(Stdio::null());
    command
}

pub(crate) fn nf4<S: AsRef<OsStr>>(args: &[S]) -> Outcome {
    let output = command(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let outcome = Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    outcome
}

/// Runs the tool with `--json`, which must succeed.
pub(crate) fn json<S: AsRef<OsStr>>(args: &[S]) -> Value {
    let outcome = nf4(&[&[OsStr::new("--json")], &*args.iter().map(AsRef::as_ref).collect::<Vec<_>>()].concat());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stderr, "", "nothing on standard error when it is not a terminal");
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {}", outcome.stdout))
}

/// Runs the tool, which must fail with status 1 and name all of `parts` on standard error.
pub(crate) fn fails<S: AsRef<OsStr>>(args: &[S], parts: &[&str]) {
    let outcome = nf4(args);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert_eq!(outcome.stdout, "");
    for part in parts {
        assert!(outcome.stderr.contains(part), "{part:?} is not in {:?}", outcome.stderr);
    }
}

/// A file or directory of the reference data.
pub(crate) fn reference(path: &str) -> PathBuf {
    let root = std::env::var_os("NF4_REFERENCE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference"), PathBuf::from);
    root.join(path)
}

/// Names in a directory, sorted; hidden ones too.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// Everything at and below a path: what kind it is, and the bytes of a file or the target of a link.
pub(crate) fn contents(path: &Path) -> Vec<(PathBuf, String, Vec<u8>)> {
    let kind = path.symlink_metadata().unwrap().file_type();
    let bytes = if kind.is_file() {
        std::fs::read(path).unwrap()
    } else if kind.is_symlink() {
        std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes()
    } else {
        Vec::new()
    };
    // The path of the root is left out, so that what was moved compares equal.
    let mut all = vec![(PathBuf::new(), format!("{kind:?}"), bytes)];
    if kind.is_dir() {
        for name in names(path) {
            let below = contents(&path.join(&name)).into_iter();
            all.extend(below.map(|(path, kind, bytes)| (Path::new(&name).join(path), kind, bytes)));
        }
    }
    all
}
