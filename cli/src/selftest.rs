//! `nf4 selftest`: every instruction set of this machine against portable code.

mod machine;
mod shapes;

use anyhow::Result;
use clap::Args;
use nf4::Kernels;
use serde_json::json;

use crate::bench::{Bench, Measurement};
use crate::report::Prepared;
use crate::text::Text;
use crate::vector::{Buffers, run_all};

/// Check every instruction set of this machine against portable code, and measure it.
///
/// Each computes the committed test vector, whose hash is the same on every machine in the world, and operations of
/// random shapes, whose results must be those of portable code bit for bit. Speeds are those of one thread, in weights/ns
/// and relative to a pure read of the same bytes. If your processor is one that nobody has reported yet, please send in
/// what `nf4 selftest --json` prints.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  nf4 selftest --json > my-machine.json

Exit status 3: some instruction set computes something else.")]
pub(crate) struct Selftest {
    /// Random shapes that each instruction set computes
    #[arg(long, default_value_t = 300, value_name = "N")]
    shapes: u32,
    /// Where the random shapes begin
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Rounds of measuring; the median of each operation's times is reported. 0: do not measure
    #[arg(long, default_value_t = 7, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    rounds: u32,
}

/// The hash of the test vector, on every machine.
const HASH: u64 = 0x4045_a786_7415_edb5;

/// The matrix that is measured: its codes and scales are larger than most second-level caches.
const SHAPE: [usize; 2] = [4096, 4096];
const BATCH: usize = 16;

impl Selftest {
    pub(crate) fn run(&self) -> Result<Prepared> {
        let measure = |batch| -> Result<Vec<Measurement>> {
            match self.rounds {
                0 => Ok(Vec::new()),
                rounds => Ok(Bench::products(SHAPE, batch, rounds).measure()?.operations),
            }
        };
        let speeds = [measure(1)?, measure(BATCH)?];
        let mut buffers = Box::new(Buffers::new());
        let mut rows = vec![
            ["instruction set", "test vector", "random shapes", "1 vector", "of a read", "batch 16", "f32"]
                .map(str::to_owned)
                .to_vec(),
        ];
        let (mut good, mut sets, mut findings) = (true, Vec::new(), Vec::new());
        for kernels in Kernels::available() {
            let isa = kernels.isa().name();
            let (hash, changed) = run_all(kernels, &mut buffers)?;
            let vector_is_good = hash == HASH && changed == 0;
            let differences = shapes::differences(kernels, self.seed, self.shapes)?;
            good &= vector_is_good && differences.is_empty();
            if !vector_is_good {
                findings.push(format!("{isa}: the hash of the test vector is {hash:016x} instead of {HASH:016x}"));
            }
            findings.extend(differences.iter().map(|what| format!("{isa}: {what} differs from portable code")));
            let speed = |measured: &[Measurement], operation: &str| {
                measured.iter().find(|m| m.isa == isa && m.operation == operation).cloned()
            };
            let [one, exact] = ["product 16x4", "product f32"].map(|name| speed(&speeds[0], name));
            let batch = speed(&speeds[1], "product 16x4");
            let number =
                |m: &Option<Measurement>| m.as_ref().map_or(String::new(), |m| format!("{:.2}", m.weights_per_ns));
            let share = one.as_ref().map_or(String::new(), |m| format!("{:.0} %", m.share_of_read * 100.0));
            let equal = self.shapes as usize - differences.len().min(self.shapes as usize);
            rows.push(vec![
                isa.to_owned(),
                format!("{hash:016x}{}", if vector_is_good { "" } else { " WRONG" }),
                if differences.is_empty() { format!("{equal} equal") } else { "DIFFERENT".to_owned() },
                number(&one),
                share,
                number(&batch),
                number(&exact),
            ]);
            sets.push(json!({
                "isa": isa,
                "hash": format!("{hash:016x}"),
                "changed_vectors": changed,
                "differences": differences,
                "one_vector": one,
                "batch": batch,
                "f32": exact,
            }));
        }
        let machine = machine::describe();
        let mut text = Text::default();
        for (name, value) in &machine {
            text.line(format_args!("{name:<15}  {value}"));
        }
        let read = speeds[0].iter().find(|m| m.operation == "read");
        if let Some(read) = read {
            text.line(format_args!("{:<15}  {:.1} GB/s, one thread", "a pure read", read.gb_per_s));
        }
        text.line("").table(&rows);
        if read.is_some() {
            text.line(format_args!(
                "speeds in weights/ns, one thread, {} x {}, block 64; of {BATCH} vectors at once in multiply-adds/ns",
                SHAPE[0], SHAPE[1]
            ));
        }
        for finding in &findings {
            text.line(finding);
        }
        text.line(if good {
            "All instruction sets return the same bits."
        } else {
            "NOT the same bits: please report this."
        });
        let machine: serde_json::Map<_, _> =
            machine.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let json = json!({
            "machine": machine,
            "hash": format!("{HASH:016x}"),
            "seed": self.seed,
            "shapes": self.shapes,
            "rounds": self.rounds,
            "shape": SHAPE,
            "batch": BATCH,
            "read": read,
            "instruction_sets": sets,
            "good": good,
        });
        Ok(Prepared::report(text, json, good))
    }
}
