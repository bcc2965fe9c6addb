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
use crate::vector::{Buffers, Summary, run_all};

/// Check every instruction set of this machine against portable code, and measure it.
///
/// Each computes the committed test vector, whose hash is the same on every machine in the world, and operations of
/// random shapes, whose results must be those of portable code bit for bit. Speeds are those of one thread, in GMAC/s and
/// relative to a pure read of the same bytes. If nobody has reported your processor yet, please send in the output of
/// `nf4 selftest --json`.
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

/// The matrix that is measured: its codes and scales are larger than most second-level caches.
const SHAPE: [usize; 2] = [4096, 4096];
const BATCH: usize = 16;

/// What an instruction set computed.
#[derive(Debug, Clone)]
struct Checked {
    isa: &'static str,
    vector: Summary,
    /// Operations on random shapes whose results are not those of portable code.
    differences: Vec<String>,
}

impl Checked {
    fn new(kernels: Kernels, seed: u64, shapes: u32) -> Result<Self> {
        let vector = run_all(kernels, &mut Box::new(Buffers::new()))?;
        let differences = shapes::differences(kernels, seed, shapes)?;
        Ok(Self { isa: kernels.isa().name(), vector, differences })
    }

    fn has_vector(&self) -> bool {
        self.vector == Summary::EXPECTED
    }

    fn is_good(&self) -> bool {
        self.has_vector() && self.differences.is_empty()
    }

    /// A line for each thing that is wrong.
    fn findings(&self) -> Vec<String> {
        let Self { isa, vector, differences } = self;
        let vector = format!(
            "{isa}: the test vector's hashes are {vector} instead of {}, {} of its vectors changed",
            Summary::EXPECTED,
            vector.changed
        );
        let vector = (!self.has_vector()).then_some(vector);
        vector
            .into_iter()
            .chain(differences.iter().map(|what| format!("{isa}: {what} differs from portable code")))
            .collect()
    }
}

impl Selftest {
    pub(crate) fn run(&self) -> Result<Prepared> {
        let checked = Kernels::available().map(|kernels| Checked::new(kernels, self.seed, self.shapes));
        let checked = checked.collect::<Result<Vec<_>>>()?;
        let measure = |batch| -> Result<Vec<Measurement>> {
            match self.rounds {
                0 => Ok(Vec::new()),
                rounds => Ok(Bench::products(SHAPE, batch, rounds).measure()?.operations),
            }
        };
        Ok(self.report(&checked, &measure(1)?, &measure(BATCH)?))
    }

    fn report(&self, checked: &[Checked], one: &[Measurement], batch: &[Measurement]) -> Prepared {
        let (mut text, machine) = (Text::default(), machine::describe());
        for (name, value) in &machine {
            text.line(format_args!("{name:<15}  {value}"));
        }
        let read = one.iter().find(|m| m.operation == "read");
        if let Some(read) = read {
            text.line(format_args!("{:<15}  {:.1} GB/s, one thread", "a pure read", read.gb_per_s));
        }
        let titles = [
            "instruction set",
            "test vector",
            "random shapes",
            "1 vector",
            "of a read",
            "batch 16",
            "8x8",
            "batch 16",
            "f32",
        ];
        let (mut rows, mut sets) = (vec![titles.map(str::to_owned).to_vec()], Vec::new());
        for set in checked {
            let of = |measured: &[Measurement], operation: &str| {
                measured.iter().find(|m| m.isa == set.isa && m.operation == operation).cloned()
            };
            let (product, batch_16x4) = (of(one, "product 16x4"), of(batch, "product 16x4"));
            let (coarse, batch_8x8) = (of(one, "product 8x8"), of(batch, "product 8x8"));
            let exact = of(one, "product f32");
            let cell =
                |m: &Option<Measurement>, show: fn(&Measurement) -> String| m.as_ref().map_or(String::new(), show);
            let speed = |m: &Measurement| format!("{:.2}", m.gmac_per_s);
            let share = |m: &Measurement| format!("{:.0} %", m.share_of_read * 100.0);
            rows.push(vec![
                set.isa.to_owned(),
                format!("{:016x}{}", set.vector.hash, if set.has_vector() { "" } else { " WRONG" }),
                if set.differences.is_empty() { format!("{} equal", self.shapes) } else { "DIFFERENT".to_owned() },
                cell(&product, speed),
                cell(&product, share),
                cell(&batch_16x4, speed),
                cell(&coarse, speed),
                cell(&batch_8x8, speed),
                cell(&exact, speed),
            ]);
            sets.push(json!({
                "isa": set.isa,
                "hash": format!("{:016x}", set.vector.hash),
                "hash_8x8": format!("{:016x}", set.vector.hash_8x8),
                "hash_transposed_16x4": format!("{:016x}", set.vector.hash_transposed_16x4),
                "changed_vectors": set.vector.changed,
                "differences": set.differences,
                "one_vector": product,
                "batch": batch_16x4,
                "one_vector_8x8": coarse,
                "batch_8x8": batch_8x8,
                "f32": exact,
            }));
        }
        text.line("").table(&rows);
        if read.is_some() {
            text.line(format_args!(
                "speeds in GMAC/s, one thread, {} x {}, block 64; `batch` is of {BATCH} vectors at once",
                SHAPE[0], SHAPE[1]
            ));
        }
        // Whoever sees these wants all of them in JSON, and a screen of them here.
        checked.iter().flat_map(|set| set.findings()).take(20).for_each(|finding| {
            text.line(finding);
        });
        let good = checked.iter().all(Checked::is_good);
        let verdict = ["NOT the same bits: please report this.", "All instruction sets return the same bits."];
        text.line(verdict[usize::from(good)]);
        let machine: serde_json::Map<_, _> =
            machine.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let json = json!({
            "machine": machine,
            "hash": format!("{:016x}", Summary::EXPECTED.hash),
            "hash_8x8": format!("{:016x}", Summary::EXPECTED.hash_8x8),
            "hash_transposed_16x4": format!("{:016x}", Summary::EXPECTED.hash_transposed_16x4),
            "seed": self.seed,
            "shapes": self.shapes,
            "rounds": self.rounds,
            "shape": SHAPE,
            "batch": BATCH,
            "read": read,
            "instruction_sets": sets,
            "good": good,
        });
        Prepared::report(text, json, good)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is wrong with an instruction set is status 3, and said.
    #[test]
    fn what_is_wrong_is_seen() {
        let command = Selftest { shapes: 3, seed: 1, rounds: 0 };
        let good = Checked::new(Kernels::detect(), 1, 3).unwrap();
        let with = |vector| Checked { vector, ..good.clone() };
        let vector = good.vector;
        let wrong = [
            (with(Summary { hash: vector.hash ^ 1, ..vector }), "are 4045a7867415edb4, 8x8"),
            (with(Summary { hash_8x8: vector.hash_8x8 ^ 1, ..vector }), "8x8 534327dad5096747, "),
            (
                with(Summary { hash_transposed_16x4: vector.hash_transposed_16x4 ^ 1, ..vector }),
                "transposed 16x4 50d0d391386cdb93 instead of 4045a7867415edb5, 8x8 534327dad5096746, transposed 16x4 \
                 50d0d391386cdb92",
            ),
            (with(Summary { changed: 1, ..vector }), "1 of its vectors changed"),
            (Checked { differences: vec!["gemv of 3 x 4".to_owned()], ..good.clone() }, "gemv of 3 x 4 differs"),
        ];
        assert!(command.report(std::slice::from_ref(&good), &[], &[]).commit().unwrap().good);
        for (set, part) in wrong {
            let report = command.report(&[good.clone(), set, good.clone()], &[], &[]).commit().unwrap();
            assert!(!report.good && report.json["good"] == false);
            assert!(report.text.contains(part) && report.text.contains("NOT the same bits"), "{}", report.text);
        }
    }
}
