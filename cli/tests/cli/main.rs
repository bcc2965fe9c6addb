//! The tool `nf4`, run as a program.
#![allow(
    clippy::unwrap_used,
    clippy::std_instead_of_alloc,
    clippy::std_instead_of_core,
    reason = "tests panic, have std"
)]

#[path = "../../../tests/support/mod.rs"]
mod support;

mod bench;
mod commit;
mod docs;
mod field;
mod field_quantize;
mod files;
mod hostile;
mod inputs;
mod memory;
mod merge;
mod messages;
mod output;
mod quantize;
mod reference;
mod run;
mod selftest;
mod signals;
mod speed;
mod verify;
