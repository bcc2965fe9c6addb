//! The committed test vector on every instruction set of this machine.

#[path = "support/generator.rs"]
mod generator;
#[path = "support/vector.rs"]
mod vector;

use nf4::Kernels;
use vector::{Buffers, Summary, VECTORS, run_all};

#[test]
fn every_isa_gives_the_committed_hashes() {
    let mut buffers = Box::new(Buffers::new());
    let mut changed = 0;
    for kernels in Kernels::available() {
        for v in &VECTORS {
            for ((part, got), expected) in v.run(kernels, &mut buffers).unwrap().into_iter().zip(v.expected) {
                if got != expected {
                    println!("CHANGED {} {:10} {part}: {got:#x}", kernels.isa(), v.name);
                    changed += 1;
                }
            }
        }
        let summary = run_all(kernels, &mut buffers).unwrap();
        println!("vectors {:<13} {summary}", kernels.isa());
        changed += usize::from(summary != Summary::EXPECTED);
    }
    assert_eq!(changed, 0, "hashes that have changed; {} expected", Summary::EXPECTED);
}
