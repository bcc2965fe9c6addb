//! The command line as code of the target `cli_paths`: what stands in `main.rs` of the tool, without what only the top of
//! a crate may have, and with its modules found where they are.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../src/bin/nf4");
    let source = std::fs::read_to_string(folder.join("main.rs"))?;
    let line = |line: &str| match line.strip_prefix("mod ").and_then(|name| name.strip_suffix(';')) {
        Some(name) => format!("#[path = {:?}]\nmod {name};\n", folder.join(name).with_extension("rs")),
        None => format!("{line}\n"),
    };
    let text: String = source.lines().filter(|l| !l.starts_with("#!") && !l.starts_with("//!")).map(line).collect();
    println!("cargo::rerun-if-changed={}", folder.join("main.rs").display());
    std::fs::write(Path::new(&std::env::var("OUT_DIR").expect("cargo sets it")).join("cli.rs"), text)
}
