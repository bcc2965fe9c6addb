//! Every ISA against data made by `bitsandbytes`, PEFT, transformers and `PyTorch`; one test for each kind of case.
//!
//! The data is the tree in `tests/data/reference`, or the one that the environment variable `NF4_REFERENCE` names.
//! `NF4_REQUIRE_ISA` names ISAs that must be there. `cargo test --test reference -- --nocapture` shows the counts.
#![cfg(feature = "alloc")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "every test program uses a part of this")]
#[path = "../support/truth.rs"]
mod truth;

mod adapters;
mod layers;
mod linear;
mod minilm;
mod products;
mod quantization;
mod second_level;
mod tables;
mod training;

use support::{Case, Checker, Tree, check_kind};

/// The kinds of cases, and what checks them.
const KINDS: [(&str, fn(&mut Checker, &Case)); 9] = [
    ("nf4", quantization::nf4),
    ("tables", tables::tables),
    ("double_quant", quantization::double_quant),
    ("double_quant_stats", second_level::stats),
    ("linear4bit", linear::linear4bit),
    ("checkpoint", linear::checkpoint),
    ("peft", adapters::peft),
    ("minilm", minilm::minilm),
    ("sgd", adapters::sgd),
];

fn run(kind: &str) {
    let (_, check) = KINDS.into_iter().find(|(k, _)| *k == kind).unwrap();
    check_kind(kind, check);
}

#[test]
fn nf4() {
    run("nf4");
}

#[test]
fn tables() {
    run("tables");
}

#[test]
fn double_quant() {
    run("double_quant");
}

#[test]
fn double_quant_stats() {
    run("double_quant_stats");
}

#[test]
fn linear4bit() {
    run("linear4bit");
}

#[test]
fn checkpoint() {
    run("checkpoint");
}

#[test]
fn peft() {
    run("peft");
}

#[test]
fn minilm() {
    run("minilm");
}

#[test]
fn sgd() {
    run("sgd");
}

#[test]
fn no_case_is_left_out() {
    for case in Tree::open().cases {
        assert!(KINDS.iter().any(|(kind, _)| *kind == case.kind()), "{}: unknown kind {}", case.id(), case.kind());
    }
}
