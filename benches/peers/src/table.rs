//! A run as Markdown.

use crate::measure::Record;
use crate::run::{Missing, Run};

const EXPLANATION: &str = "\
Products in GMAC/s, which for one vector is weights per nanosecond. The error is that of one vector, relative to the root mean
square of the exact product with the peer's own quantized weights. Of a read: the bandwidth that it reaches from DRAM, as a
share of that of a pure read in the same process.";

pub fn print(run: &Run) {
    let threads = run.records.iter().map(|r| r.threads).max().unwrap_or(0);
    println!("{}; peers built for {}.", run.cpu, run.built_for);
    println!("{} x {}, f32 in and out; medians of {} rounds.", run.rows, run.cols, run.rounds);
    println!("{EXPLANATION}");
    for n in 1..=threads {
        print_products(run, n);
    }
    print_conversions(run);
    for Missing { name, why } in &run.missing {
        println!("\nNot measured: {name}: {why}");
    }
    let versioned = run.records.iter().filter(|r| !r.version.is_empty());
    let mut versions: Vec<_> = versioned.map(|r| format!("{} {}", r.library, r.version)).collect();
    versions.sort();
    versions.dedup();
    versions.extend(run.tools.iter().cloned());
    println!("\nVersions: {}.", versions.join("; "));
    println!("\n```sh\n{}\n```", run.command);
}

fn print_products(run: &Run, threads: usize) {
    let mut records: Vec<_> = run.records.iter().filter(|r| r.threads == threads).collect();
    if records.is_empty() {
        return;
    }
    records.sort_by(|a, b| b.cache.partial_cmp(&a.cache).unwrap_or(core::cmp::Ordering::Equal));
    let columns = "bits | in cache | DRAM | of a read | batch 8 | batch 128 | error, rms | largest |";
    println!("\n| threads: {threads} | {columns}");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|");
    for r in &records {
        println!(
            "| {} | {:.1} | {} | {} | {} | {} | {} | {} | {} |",
            r.name,
            r.bits,
            speed(r.cache),
            speed(r.dram),
            share_of_read(r, &records).map_or("-".into(), |x| format!("{x:.2}")),
            speed(r.batch8),
            speed(r.batch128),
            error(r.error_rms),
            error(r.error_max)
        );
    }
}

fn share_of_read(record: &Record, records: &[&Record]) -> Option<f64> {
    let read = records.iter().find(|r| r.library == "read" && r.process == record.process)?;
    Some(record.dram? * record.bits / (read.dram? * read.bits))
}

fn print_conversions(run: &Run) {
    let mut records: Vec<_> = run.records.iter().filter(|r| r.dequantize.is_some()).collect();
    if records.is_empty() {
        return;
    }
    records.sort_by(|a, b| b.dequantize.partial_cmp(&a.dequantize).unwrap_or(core::cmp::Ordering::Equal));
    println!("\n| conversions in cache, one thread, billions of weights per second | from f32 | to f32 |");
    println!("|---|--:|--:|");
    for r in records {
        println!("| {} | {} | {} |", r.name, speed(r.quantize), speed(r.dequantize));
    }
}

fn speed(x: Option<f64>) -> String {
    let decimals = |x| if x < 0.1 { 3 } else { 1 + usize::from(x < 10.0) };
    x.map_or("-".into(), |x| format!("{x:.*}", decimals(x)))
}

fn error(x: Option<f64>) -> String {
    x.map_or("-".into(), |x| format!("{x:.0e}"))
}
