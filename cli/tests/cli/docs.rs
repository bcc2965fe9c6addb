//! `docs/cli.md`: its examples run, and it names every command, option and field.

use std::fs;
use std::path::Path;

use clap::CommandFactory;
use nf4::checkpoint::FloatType;
use tempfile::{TempDir, tempdir};

use crate::files::sharded;
use crate::run::{command, reference};

fn docs() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md")).unwrap()
}

/// The part about a command.
fn section<'a>(docs: &'a str, name: &str) -> &'a str {
    let start = docs.find(&format!("\n## {name}\n")).unwrap_or_else(|| panic!("no section {name}"));
    let rest = &docs[start + 4..];
    rest.find("\n## ").map_or(rest, |end| &rest[..end])
}

/// A folder with the models that the examples start from.
fn folder() -> TempDir {
    let root = tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    sharded(&path("Llama-3.2-1B"), FloatType::F32);
    for name in ["my-base", "my-adapter"] {
        fs::create_dir(path(name)).unwrap();
    }
    let case = reference("peft/rank8_nodq");
    fs::copy(case.join("base.safetensors"), path("my-base/model.safetensors")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(case.join(name), path("my-adapter").join(name)).unwrap();
    }
    root
}

/// Runs every example, those of `quantize` first because others start from what it makes, and then once more with
/// `--json`: all of the object's fields are named.
#[test]
fn examples() {
    let docs = docs();
    let root = folder();
    let mut count = 0;
    for name in ["quantize", "inspect", "dequantize", "merge", "verify", "bench", "selftest"] {
        let section = section(&docs, name);
        let lines: Vec<_> = section.lines().filter(|line| line.starts_with("nf4 ")).collect();
        assert!(!lines.is_empty(), "{name} has no example");
        for line in lines {
            let args: Vec<_> = line.split(' ').skip(1).collect();
            assert_eq!(args[0], name);
            let run = |more: &[&str]| {
                let output = command(&[&args, more].concat()).current_dir(root.path()).output().unwrap();
                assert!(output.status.success(), "{line}: {output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            assert!(!run(&[]).is_empty());
            let force = if line.contains("--out") { &["--force"][..] } else { &[] };
            let json = if line.contains("--json") { &[][..] } else { &["--json"] };
            let report: serde_json::Value = serde_json::from_str(&run(&[force, json].concat())).unwrap();
            for field in report.as_object().unwrap().keys() {
                assert!(section.contains(&format!("`{field}`")), "{name}: the field {field} is not documented");
            }
            count += 1;
        }
    }
    println!("{count} examples");
}

/// Every command and option of the program is in the text, and no other option.
#[test]
fn commands_and_options() {
    let docs = docs();
    let mut program = nf4_cli::Cli::command();
    program.build();
    let common = section(&docs, "What all commands have in common").to_owned();
    let mut known = Vec::new();
    for command in program.get_subcommands() {
        let section = section(&docs, command.get_name());
        assert!(
            docs.contains(&format!("[`{0}`](#{0})", command.get_name())),
            "{} is not in the table",
            command.get_name()
        );
        for argument in command.get_arguments() {
            let Some(long) = argument.get_long() else { continue };
            let option = format!("`--{long}");
            assert!(section.contains(&option) || common.contains(&option), "{}: {option}", command.get_name());
            known.push(long.to_owned());
        }
    }
    let is_part = |c: char| c.is_ascii_lowercase() || c == '-';
    for (at, _) in docs.match_indices("`--") {
        let long: String = docs[at + 3..].chars().take_while(|c| is_part(*c)).collect();
        assert!(known.contains(&long) || long == "version", "--{long} is no option");
    }
}
