//! The command line tool with any arguments, on a folder of models, adapters, links and other files, one of which may be
//! damaged, or hold very many tensors: it never panics, takes no time that grows faster than its files, and its status is
//! one of those that it documents. Whatever fails changes nothing at all; what succeeds changes what is named by `--out`
//! alone, that only if it was not there or with `--force`, and never an input.
//!
//! Between the work and the moment in which the output gets its name, something may come to its place, or go: the promises
//! are those of that moment.
//!
//! Left out are the program's `main`, the handler for interrupts, `selftest`, and large matrices of `bench`.
#![no_main]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use libfuzzer_sys::fuzz_target;
use nf4_cli::{Cli, Report};
use nf4_fuzz::files::{self, parts, with_header};
use nf4_fuzz::folder::{Comer, Contents, FILES, Folder, WORDS};
use nf4_fuzz::many::{self, timed};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    /// Which file is changed before, and in which way; in the higher bits of `change`, what happens before the commit.
    file: u8,
    change: u8,
    /// How many of the bytes are the command line; the others are for the change.
    command: u8,
    bytes: &'a [u8],
}

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(|input: Input<'_>| {
    let (command, change) = input.bytes.split_at(usize::from(input.command).min(input.bytes.len()));
    let arguments = arguments(command);
    if arguments.iter().any(|a| leaves(a)) {
        return;
    }
    let (name, bytes) = FILES[usize::from(input.file) % FILES.len()];
    FOLDER.restore();
    match input.change % 8 {
        0 => FOLDER.replace(name, Some(&files::changed(bytes, change))),
        1 => FOLDER.replace(name, Some(change)),
        2 if name.ends_with(".safetensors") => FOLDER.replace(name, Some(&with_header(change, parts(bytes).1))),
        3 => FOLDER.replace(name, Some(&bytes[..bytes.len() - change.len() % (bytes.len() + 1)])),
        4 => FOLDER.replace(name, None),
        5 if name.ends_with(".safetensors") => FOLDER.replace(name, Some(&many::tensors(change))),
        _ => {}
    }
    let comer = Comer::ALL[usize::from(input.change / 8) % Comer::ALL.len()];
    FOLDER.enter(|| timed("a command", || check(&arguments, comer)));
});

/// The words of a command line, which zeros end: a byte above 127 stands for one of [`WORDS`]. A slash comes from those
/// alone.
fn arguments(bytes: &[u8]) -> Vec<OsString> {
    fn part(byte: &u8) -> &[u8] {
        match byte.checked_sub(128) {
            Some(i) => WORDS[usize::from(i) % WORDS.len()],
            None if *byte == b'/' => b"_",
            None => std::slice::from_ref(byte),
        }
    }
    let argument = |word: &[u8]| OsString::from_vec(word.iter().flat_map(part).copied().collect());
    std::iter::once("nf4".into()).chain(bytes.split(|b| *b == 0).map(argument)).collect()
}

/// Whether an argument may name something outside of the folder.
fn leaves(argument: &OsStr) -> bool {
    let bytes = argument.as_bytes();
    bytes.starts_with(b"/") || bytes.windows(2).any(|w| w == b"=/") || bytes.windows(5).any(|w| w == b"../..")
}

/// Runs the tool, and has something happen at the place of its output.
fn check(arguments: &[OsString], comer: Comer) {
    let matches = match Cli::command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => {
            assert!([0, 2].contains(&error.exit_code()));
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let cli = Cli::from_arg_matches(&matches).expect("they are its own");
    let (name, options) = matches.subcommand().expect("there must be one");
    if name == "selftest" || name == "bench" && !is_small(options) {
        return;
    }
    let paths = |ids: &[&str]| -> Vec<PathBuf> {
        let path = |id: &&str| options.try_get_one::<PathBuf>(id).ok().flatten().cloned();
        ids.iter().filter_map(path).collect()
    };
    let inputs = paths(&["path", "model", "other", "base", "adapter"]);
    let inputs: Vec<PathBuf> = inputs.iter().filter_map(|path| path.canonicalize().ok()).collect();
    // The place of the output: a link at its end is what stands there, one before is followed.
    let output = paths(&["out"]).pop().and_then(|out| {
        let parent = out.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        Some(parent.canonicalize().ok()?.join(out.file_name()?))
    });
    let force = matches!(options.try_get_one("force"), Ok(Some(true)));

    let before = FOLDER.contents();
    let prepared = cli.prepare();
    let at_work = FOLDER.contents();
    let visible = changed(&before, &at_work).into_iter().find(|path| !is_hidden(path));
    assert_eq!(visible, None, "changed before the commit");
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            assert!(!format!("{error:#}").is_empty());
            assert_eq!(changed(&before, &at_work), Vec::<&PathBuf>::new(), "changed by what failed: {error:#}");
            return;
        }
    };
    let moved = output.as_ref().and_then(|output| FOLDER.come(output, comer));
    let may_be_replaced = output.as_ref().is_some_and(|output| force && is_file_or_model(output));
    let mut before = FOLDER.contents();
    before.retain(|path, _| !is_hidden(path));
    let result = prepared.commit();
    let after = FOLDER.contents();
    match result {
        Err(error) => {
            assert!(!format!("{error:#}").is_empty());
            assert_eq!(changed(&before, &after), Vec::<&PathBuf>::new(), "changed by a commit that failed: {error:#}");
        }
        Ok(Report { text, json, good: _ }) => {
            assert!(!text.is_empty() && json.is_object());
            assert!(!moved.is_some_and(|moved| inputs.contains(&moved)), "an input was moved there");
            let output = output.unwrap_or_default();
            for path in changed(&before, &after) {
                assert!(path.starts_with(&output), "{} is not below the output {}", path.display(), output.display());
                assert!(may_be_replaced || !before.contains_key(path), "{} was there", path.display());
                let of_input = |input: &PathBuf| path == input || path.parent() == Some(input);
                let is_input = before.get(path).is_some_and(Option::is_some) && inputs.iter().any(of_input);
                assert!(!is_input || comer != Comer::Nothing, "{} is an input", path.display());
            }
        }
    }
}

/// Whether a path is in a hidden directory of the tool.
fn is_hidden(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().as_bytes().starts_with(b".nf4-partial-"))
}

/// Whether `--force` replaces what stands there: a file, or a directory of files alone with one of tensors.
fn is_file_or_model(path: &Path) -> bool {
    let Ok(metadata) = path.symlink_metadata() else { return false };
    if !metadata.is_dir() {
        return metadata.is_file();
    }
    let entries: Vec<_> = path.read_dir().expect("in our folder").map(|entry| entry.expect("in our folder")).collect();
    let is_file = |entry: &std::fs::DirEntry| entry.file_type().expect("in our folder").is_file();
    let has_tensors = entries.iter().any(|entry| entry.path().extension().is_some_and(|e| e == "safetensors"));
    entries.iter().all(is_file) && (has_tensors || entries.is_empty())
}

/// What is not in both, or not the same.
fn changed<'a>(before: &'a Contents, after: &'a Contents) -> Vec<&'a PathBuf> {
    let all = before.keys().chain(after.keys());
    all.filter(|path| before.get(*path) != after.get(*path)).collect()
}

/// Whether a benchmark is of a size that a fuzzer has the time for.
fn is_small(options: &ArgMatches) -> bool {
    [("shape", 5), ("batch", 1), ("rounds", 1)].iter().all(|(id, most)| {
        let given = options.value_source(id) == Some(clap::parser::ValueSource::CommandLine);
        given && options.get_raw(id).is_some_and(|mut values| values.all(|v| v.len() <= *most))
    })
}
