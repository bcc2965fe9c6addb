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
            let got = v.run(kernels, &mut buffers).unwrap();
            let same = got == v.expected;
            println!("{:6} {:10} {} {got:#x?}", kernels.isa(), v.name, if same { "ok" } else { "CHANGED" });
            changed += usize::from(!same);
        }
        let Summary { hash, hash_8x8, .. } = run_all(kernels, &mut buffers).unwrap();
        println!("vectors {:<13} {hash:016x}, 8x8 {hash_8x8:016x}", kernels.isa());
    }
    assert_eq!(changed, 0, "vectors in which a bit has changed");
}
