//! Stopped between start and commit, then continued, interrupted or killed.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use nf4::checkpoint::{FloatType, TensorMap};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::files::{add, save, weights};
use crate::run::{command, json, names};

/// How often each signal must find the tool at work.
const TIMES: usize = 4;

/// A folder with a file `in` of 16 MB of weights, which keep the tool busy for longer than it takes to stop it.
fn folder() -> TempDir {
    let root = tempdir().unwrap();
    let mut map = TensorMap::new();
    for i in 0..8 {
        add(&mut map, &format!("layer{i}.weight"), FloatType::F32, &[512, 1024], &weights(&[512, 1024], i));
    }
    save(&root.path().join("in"), &map);
    root
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Runs the tool, with an output `out` that may be replaced if it is `there` already, and stops it at work; `None` if it
/// was too fast.
fn stopped(root: &Path, there: bool) -> Option<Child> {
    let out = root.join("out");
    if there {
        fs::write(&out, "old").unwrap();
    }
    let (input, out_path) = (root.join("in"), out.to_str().unwrap());
    let force = if there { &["--force"][..] } else { &[] };
    let args = [&["quantize", input.to_str().unwrap(), "--out", out_path, "--threads", "1"], force].concat();
    let mut child = command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut has_ended = || child.try_wait().unwrap().is_some();
    while hidden(root).is_empty() && !has_ended() {
        std::thread::yield_now();
    }
    if has_ended() {
        return None;
    }
    send(&child, Signal::STOP);
    // It may have gone on until the signal came.
    while !is_stopped(&child) && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let is_at_work = !hidden(root).is_empty() && fs::read(&out).ok() == there.then(|| b"old".to_vec());
    if !is_at_work {
        send(&child, Signal::CONT);
        child.wait().unwrap();
        return None;
    }
    Some(child)
}

#[cfg(target_os = "linux")]
fn is_stopped(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
}

#[cfg(not(target_os = "linux"))]
fn is_stopped(_: &Child) -> bool {
    std::thread::sleep(std::time::Duration::from_millis(20));
    true
}

/// The hidden directories.
fn hidden(root: &Path) -> Vec<String> {
    names(root).into_iter().filter(|name| name.starts_with(".nf4-partial-")).collect()
}

/// Stops the tool at work as often as is asked for, and does something with it each time. It says how often it was too
/// fast to be stopped; that must not be so most of the time.
fn each_time(root: &Path, there: bool, mut then: impl FnMut(Child)) {
    let (mut times, mut too_fast) = (0, 0);
    while times < TIMES {
        match stopped(root, there) {
            Some(child) => {
                then(child);
                times += 1;
            }
            None => too_fast += 1,
        }
        let _ = fs::remove_file(root.join("out"));
        assert!(too_fast <= 5 * TIMES, "stopped at work {times} times only, too fast {too_fast} times");
    }
    println!("stopped at work {times} times, too fast {too_fast} times");
}

fn stderr(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn continued() {
    let root = folder();
    let (root, out) = (root.path(), root.path().join("out"));
    each_time(root, false, |child| {
        send(&child, Signal::CONT);
        assert_eq!(stderr(child), (Some(0), String::new()));
        json(&["verify", out.to_str().unwrap(), root.join("in").to_str().unwrap()]);
        assert_eq!(names(root), ["in", "out"]);
    });
    // A thesis came meanwhile.
    for there in [false, true] {
        each_time(root, there, |child| {
            let _ = fs::remove_file(&out);
            fs::create_dir(&out).unwrap();
            fs::write(out.join("thesis.txt"), "thesis").unwrap();
            send(&child, Signal::CONT);
            let (code, error) = stderr(child);
            assert_eq!(code, Some(1), "{error}");
            assert!(error.contains("out exists"), "{error}");
            assert_eq!(fs::read(out.join("thesis.txt")).unwrap(), b"thesis");
            assert_eq!(names(root), ["in", "out"]);
            fs::remove_dir_all(&out).unwrap();
        });
    }
}

/// Interrupted, it ends with status 130; what it had begun is gone, and what was there is there. If the interrupt comes too
/// late, the output is there, and the status is that of success.
#[test]
fn interrupted() {
    let root = folder();
    let (root, out) = (root.path(), root.path().join("out"));
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        if signal == Signal::HUP && hangups_are_ignored() {
            println!("{signal:?}: ignored by these tests and so by the tool, as under nohup");
            continue;
        }
        let mut interrupted = 0;
        for there in [false, true] {
            each_time(root, there, |child| {
                send(&child, signal);
                send(&child, Signal::CONT);
                let (code, error) = stderr(child);
                assert_eq!(hidden(root), Vec::<String>::new(), "{signal:?}");
                if code == Some(0) {
                    json(&["verify", out.to_str().unwrap(), root.join("in").to_str().unwrap()]);
                    return;
                }
                interrupted += 1;
                assert_eq!(code, Some(130), "{signal:?}: {error}");
                let left = fs::read(&out).ok();
                assert!(left == there.then(|| b"old".to_vec()), "{signal:?}: {:?} bytes", left.map(|left| left.len()));
            });
        }
        assert!(interrupted > 0, "{signal:?}: always too late");
    }
}

/// Whether programs that are started here ignore SIGHUP, the first bit of the mask; where `/proc` is missing, they do not.
fn hangups_are_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1)
}

/// Killed, it leaves a hidden directory, and nothing else that is new.
#[test]
fn killed() {
    let root = folder();
    let (root, out) = (root.path(), root.path().join("out"));
    for there in [false, true] {
        each_time(root, there, |mut child| {
            child.kill().unwrap();
            assert_eq!(child.wait().unwrap().code(), None, "a signal");
            assert_eq!(fs::read(&out).ok(), there.then(|| b"old".to_vec()));
            let [hidden] = &hidden(root)[..] else { panic!("{:?}", names(root)) };
            fs::remove_dir_all(root.join(hidden)).unwrap();
        });
    }
}

/// Killed at a random time, the last moments included, it leaves no output or a whole one.
#[test]
fn killed_at_random_times() {
    let root = folder();
    let (root, input) = (root.path(), root.path().join("in"));
    let (mut absent, mut whole) = (0, 0);
    // Wait for as long as a whole run takes, in steps, and then some.
    let start = std::time::Instant::now();
    json(&["quantize", input.to_str().unwrap(), "--out", root.join("out").to_str().unwrap()]);
    let run = start.elapsed();
    fs::remove_file(root.join("out")).unwrap();
    for attempt in 0..24_u32 {
        let out = root.join(format!("out{attempt}"));
        let args = ["quantize", input.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let mut child = command(&args).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(run * attempt / 12);
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            json(&["verify", out.to_str().unwrap(), input.to_str().unwrap()]);
            whole += 1;
        } else {
            absent += 1;
        }
    }
    println!("killed 24 times: no output {absent}, a whole one {whole}");
    assert!(absent > 0, "the first kill comes at once");
}
