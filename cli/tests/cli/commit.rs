//! What happens at the place of an output between the start of a command and its end. The library does the work in two
//! steps, so these tests stand between them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use clap::Parser;
use nf4::checkpoint::FloatType;
use nf4_cli::{Cli, Prepared};
use tempfile::{TempDir, tempdir};

use crate::files::{SHARDS, sharded};
use crate::run::{command, contents, names};

/// A model `in` of two shards, and one `file`, the first of them.
fn folder() -> (TempDir, impl Fn(&str) -> PathBuf) {
    let root = tempdir().unwrap();
    let base = root.path().to_owned();
    sharded(&base.join("in"), FloatType::F32);
    fs::copy(base.join("in").join(SHARDS[0]), base.join("file")).unwrap();
    (root, move |name| base.join(name))
}

fn prepare(input: &Path, out: &Path, force: bool) -> anyhow::Result<Prepared> {
    let (input, out) = (input.to_str().unwrap(), out.to_str().unwrap());
    let force = if force { &["--force"][..] } else { &[] };
    Cli::try_parse_from([&["nf4", "--quiet", "quantize", input, "--out", out], force].concat()).unwrap().prepare()
}

/// What may come to a place. Only the last two may be replaced, the first of them by a file, the second by a directory.
const COMERS: [&str; 9] =
    ["thesis", "config alone", "subdirectory", "link", "dangling link", "pipe", "socket", "file", "old model"];

fn come(kind: &str, out: &Path, root: &Path) {
    match kind {
        "file" => fs::write(out, "thesis").unwrap(),
        #[cfg(unix)]
        "link" => std::os::unix::fs::symlink(root.join("in"), out).unwrap(),
        #[cfg(unix)]
        "dangling link" => std::os::unix::fs::symlink("nowhere", out).unwrap(),
        #[cfg(unix)]
        "pipe" => assert!(std::process::Command::new("mkfifo").arg(out).status().unwrap().success()),
        #[cfg(unix)]
        "socket" => drop(std::os::unix::net::UnixListener::bind(out).unwrap()),
        _ => {
            fs::create_dir(out).unwrap();
            let file = match kind {
                "thesis" => "thesis.txt",
                "config alone" => "config.json",
                _ => "model.safetensors",
            };
            fs::write(out.join(file), "thesis").unwrap();
            if kind == "subdirectory" {
                fs::create_dir(out.join("mail")).unwrap();
                fs::write(out.join("mail/letter"), "dear").unwrap();
            }
        }
    }
    assert!(out.symlink_metadata().is_ok() && root.is_dir());
}

#[cfg(unix)]
#[test]
fn what_comes_meanwhile_is_not_replaced() {
    for input in ["in", "file"] {
        for force in [false, true] {
            for kind in COMERS {
                let (root, path) = folder();
                let out = path("out");
                let prepared = prepare(&path(input), &out, force).unwrap();
                assert!(!out.exists(), "nothing has the name before the commit");
                come(kind, &out, root.path());
                let before = contents(&out);
                let result = prepared.commit();
                let replaceable = force && kind == (if input == "in" { "old model" } else { "file" });
                assert_eq!(result.is_ok(), replaceable, "{input}, force {force}, {kind}: {result:?}");
                assert_eq!(contents(&out) == before, !replaceable, "{input}, force {force}, {kind}");
                if let Err(error) = result {
                    assert!(error.to_string().contains("out exists"), "{error:#}");
                }
                assert_eq!(names(root.path()), ["file", "in", "out"], "{input}, force {force}, {kind}");
            }
        }
    }
}

/// With `--force`, something replaceable was there at the start, and something else is there at the end.
#[cfg(unix)]
#[test]
fn what_was_replaceable_at_the_start() {
    for (input, at_first) in [("in", "old model"), ("file", "file")] {
        for kind in COMERS {
            let (root, path) = folder();
            let out = path("out");
            come(at_first, &out, root.path());
            let prepared = prepare(&path(input), &out, true).unwrap();
            if out.is_dir() {
                fs::remove_dir_all(&out).unwrap()
            } else {
                fs::remove_file(&out).unwrap()
            }
            come(kind, &out, root.path());
            let before = contents(&out);
            let result = prepared.commit();
            assert_eq!(result.is_ok(), kind == at_first, "{input}, {kind}: {result:?}");
            assert_eq!(contents(&out) == before, kind != at_first, "{input}, {kind}");
            assert_eq!(names(root.path()), ["file", "in", "out"], "{input}, {kind}");
        }
        let (root, path) = folder();
        come(at_first, &path("out"), root.path());
        let prepared = prepare(&path(input), &path("out"), true).unwrap();
        fs::rename(path("out"), path("moved")).unwrap();
        prepared.commit().unwrap();
        assert_eq!(names(root.path()), ["file", "in", "moved", "out"]);
    }
}

/// The input itself comes to the place.
#[test]
fn the_input_is_moved_to_the_place() {
    for input in ["in", "file"] {
        let (root, path) = folder();
        let before = contents(&path(input));
        let prepared = prepare(&path(input), &path("out"), true).unwrap();
        fs::rename(path(input), path("out")).unwrap();
        let error = prepared.commit().unwrap_err();
        assert!(error.to_string().contains("is, or holds, the input"), "{error:#}");
        assert_eq!(contents(&path("out")), before);
        assert_eq!(names(root.path()).len(), 2);
    }
}

#[test]
fn between_start_and_commit() {
    let (root, path) = folder();
    let prepared = prepare(&path("in"), &path("out"), false).unwrap();
    let [hidden, ..] = &names(root.path())[..] else { panic!("nothing") };
    assert!(hidden.starts_with(".nf4-partial-"), "{hidden}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(path(hidden).metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }
    drop(prepared);
    assert_eq!(names(root.path()), ["file", "in"], "dropped, it leaves nothing");
    // What came to the name of the hidden directory is not touched.
    fs::create_dir(path(hidden)).unwrap();
    fs::write(path(hidden).join("thesis"), "thesis").unwrap();
    prepare(&path("in"), &path("out"), false).unwrap().commit().unwrap();
    assert_eq!(fs::read(path(hidden).join("thesis")).unwrap(), b"thesis");
    assert_eq!(names(root.path()), [hidden, "file", "in", "out"]);
}

#[test]
fn two_to_one_target() {
    let (root, path) = folder();
    for input in ["in", "file"] {
        let both = [(); 2].map(|()| prepare(&path(input), &path("out"), false).unwrap());
        let results = both.map(Prepared::commit);
        assert!(results[0].is_ok(), "{results:?}");
        let error = results[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("out exists; it is replaced only with --force"), "{error}");
        let both = [(); 2].map(|()| prepare(&path(input), &path("out"), true).unwrap());
        both.into_iter().for_each(|prepared| assert!(prepared.commit().is_ok()));
        assert_eq!(names(root.path()), ["file", "in", "out"]);
        if input == "in" { fs::remove_dir_all(path("out")) } else { fs::remove_file(path("out")) }.unwrap();
    }
}

/// Processes that race to one target: one wins, all others fail, every time.
#[test]
fn races() {
    const RUNS: usize = 3;
    let (root, path) = folder();
    let mut won = [0; RUNS];
    for round in 0..10 {
        let input = ["in", "file"][round % 2];
        let run = |_| {
            let (input, out) = (path(input), path("out"));
            let args = ["--json", "quantize", input.to_str().unwrap(), "--out", out.to_str().unwrap()];
            command(&args).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<_> = (0..RUNS).map(run).collect();
        let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let codes: Vec<_> = outputs.iter().map(|output| output.status.code().unwrap()).collect();
        assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1, "{codes:?}");
        assert_eq!(codes.iter().filter(|code| **code == 1).count(), RUNS - 1, "{codes:?}");
        for output in outputs.iter().filter(|output| !output.status.success()) {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(error.contains("out exists; it is replaced only with --force"), "{error}");
        }
        won[codes.iter().position(|code| *code == 0).unwrap()] += 1;
        crate::run::json(&["verify", path("out").to_str().unwrap(), path(input).to_str().unwrap()]);
        assert_eq!(names(root.path()), ["file", "in", "out"]);
        if input == "in" { fs::remove_dir_all(path("out")) } else { fs::remove_file(path("out")) }.unwrap();
    }
    println!("winners by order of their start: {won:?}");
}

/// Where the system can exchange, there is no moment without a target.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
#[test]
fn always_there() {
    for input in ["in", "file"] {
        let (_root, path) = folder();
        prepare(&path(input), &path("out"), false).unwrap().commit().unwrap();
        let (done, seen, missing) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let there = path("out").symlink_metadata().is_ok();
                    if there { &seen } else { &missing }.fetch_add(1, Ordering::Relaxed);
                }
            });
            for _ in 0..20 {
                prepare(&path(input), &path("out"), true).unwrap().commit().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        let (seen, missing) = (seen.into_inner(), missing.into_inner());
        println!("{input}: replaced 20 times, seen {seen} times, missing {missing} times");
        assert!(seen > 0);
        assert_eq!(missing, 0);
    }
}
